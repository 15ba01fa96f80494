"""The demo: trains three adapters together on a real base model and real data, and verifies the results.

    make demo            or            python examples/demo.py

KEEP=1 leaves the service running. LORRY_DEMO_DIR sets another folder than .cache/demo. The demo can be repeated: it
keeps the base model and the service's data in this folder, and each run creates new jobs. The steps are in
demo_parts/steps.py; this file contains only what must happen before the imports.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    """Return the exit status. The imports take seconds, and a KeyboardInterrupt during them can surface as another
    error, so signals end the process directly."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end_at_once)
    from demo_parts import steps

    return steps.run()


def _end_at_once(_number: int, _frame: object) -> None:
    os.write(1, b"Interrupted before anything was started.\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
