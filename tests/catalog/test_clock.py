"""The clock of leases includes suspensions on each platform that has such a clock."""

from __future__ import annotations

import sys
import time

import pytest

from catalog import clock


@pytest.mark.parametrize(
    ("platform", "name"), [("linux", "CLOCK_BOOTTIME"), ("darwin", "CLOCK_MONOTONIC_RAW"), ("freebsd14", None)]
)
def test_boot_seconds_reads_the_clock_that_includes_suspensions(
    monkeypatch: pytest.MonkeyPatch, platform: str, name: str | None
) -> None:
    for number, clock_name in enumerate(("CLOCK_BOOTTIME", "CLOCK_MONOTONIC_RAW")):
        monkeypatch.setattr(time, clock_name, number, raising=False)
    monkeypatch.setattr(time, "clock_gettime", ["CLOCK_BOOTTIME", "CLOCK_MONOTONIC_RAW"].__getitem__)
    monkeypatch.setattr(time, "monotonic", lambda: None)
    monkeypatch.setattr(sys, "platform", platform)

    assert clock.boot_seconds() == name
