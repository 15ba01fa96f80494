"""The clock of everything that depends on a lease: the database's time goes on while this machine is suspended."""

from __future__ import annotations

import sys
import time


def boot_seconds() -> float:
    """Seconds since the machine was started, which never go back and include those in which it was suspended.

    `time.monotonic` leaves these out on Linux. On macOS it does so as well, and there is no other clock that Python
    reaches: a worker there may train until its next heartbeat after it has woken up, whose answer stops it.
    """
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()
