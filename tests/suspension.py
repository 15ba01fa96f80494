"""A suspension of the machine, as its boot-time clock shows it."""

from __future__ import annotations

import sys
import time

import pytest

NEEDS_BOOTTIME = pytest.mark.skipif(sys.platform != "linux", reason="macOS has another clock that includes suspensions")


class Suspension:
    """Advances the boot-time clock, and no other clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._seconds, clock = 0.0, time.clock_gettime

        def clock_gettime(number: int) -> float:
            return clock(number) + (self._seconds if number == time.CLOCK_BOOTTIME else 0.0)

        monkeypatch.setattr(time, "clock_gettime", clock_gettime)

    def add(self, seconds: float) -> None:
        self._seconds += seconds
