"""Trains three adapters together on a real base model and real data, and verifies them.

    make demo            or            python examples/demo.py

KEEP=1 keeps the service running. LORRY_DEMO_DIR replaces the folder .cache/demo, which keeps the base model and the
service's data. Every run creates new jobs. The steps are in demo_parts/steps.py.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    """Return the exit status. A KeyboardInterrupt during the slow imports can surface as another error."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end_at_once)
    from demo_parts import steps

    return steps.run()


def _end_at_once(_number: int, _frame: object) -> None:
    os.write(1, b"Interrupted before the demo started anything.\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
