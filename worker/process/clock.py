"""The clock for everything that depends on a lease. It includes suspensions, because leases expire during them."""

from __future__ import annotations

import sys
import time


def boot_seconds() -> float:
    """Return the seconds since the machine started, including the time in which it was suspended. Never decreases.

    `time.monotonic` excludes suspensions on Linux and macOS, and Python has no other clock for macOS. After a
    suspension, a worker on macOS may therefore train until the response to its next heartbeat stops it.
    """
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()
