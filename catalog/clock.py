"""The clock for everything that depends on a lease. It includes suspensions, because leases expire during them."""

from __future__ import annotations

import sys
import time


def boot_seconds() -> float:
    """Return the seconds since the machine started, including the time in which it was suspended. Never decreases.

    `time.monotonic` excludes suspensions on Linux and macOS. CLOCK_MONOTONIC of Linux does so too, but
    CLOCK_MONOTONIC_RAW of macOS includes them.
    """
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    if sys.platform == "darwin":
        return time.clock_gettime(time.CLOCK_MONOTONIC_RAW)
    return time.monotonic()
