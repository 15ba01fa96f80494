"""The main job, end to end: a real base, real data, three adapters trained together, and the proof that they work.

    make demo            or            python examples/demo.py

KEEP=1 leaves the service running. LORRY_DEMO_DIR names another folder than .cache/demo. It can be run again
at once: the base model and the service's data are kept there, and every run makes new jobs.
The steps are in demo_parts/steps.py; here is only what must come before the imports.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    """The exit status. The imports take seconds, and a KeyboardInterrupt amid them can come out as another error."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end_at_once)
    from demo_parts import steps

    return steps.run()


def _end_at_once(_number: int, _frame: object) -> None:
    os.write(1, b"Interrupted before anything was started.\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
