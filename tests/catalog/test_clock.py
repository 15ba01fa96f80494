"""The clock of leases includes suspensions on each platform that has such a clock."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from catalog import clock


@pytest.mark.parametrize(
    ("platform", "name"), [("linux", "CLOCK_BOOTTIME"), ("darwin", "CLOCK_MONOTONIC_RAW"), ("freebsd14", None)]
)
def test_boot_seconds_reads_the_clock_that_includes_suspensions(
    monkeypatch: pytest.MonkeyPatch, platform: str, name: str | None
) -> None:
    names = ["CLOCK_BOOTTIME", "CLOCK_MONOTONIC_RAW"]
    numbers = {clock_name: number for number, clock_name in enumerate(names)}
    time = SimpleNamespace(**numbers, clock_gettime=names.__getitem__, monotonic=lambda: None)
    monkeypatch.setattr(clock, "time", time)
    monkeypatch.setattr(sys, "platform", platform)

    assert clock.boot_seconds() == name
