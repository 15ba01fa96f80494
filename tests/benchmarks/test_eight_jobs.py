"""A time of eight scripts that is extrapolated from fewer scripts is labeled as such."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import eight_jobs
from benchmarks.results import print_table
from tests.benchmarks.toy_plan import toy_plan


class Script:
    """Replaces a script's process."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def finish(self) -> int:
        return 1000


def table_of(num_jobs: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    def trainer(*_: Any) -> dict[str, float]:
        return {"seconds": 10.0, "ready_seconds": 1.0, "verifying_seconds": 1.0, "peak_bytes": 1000}

    monkeypatch.setattr(eight_jobs, "Contender", Script)
    monkeypatch.setattr(eight_jobs, "_trainer", trainer)
    print_table([eight_jobs.run(replace(toy_plan(folder), eight_jobs=num_jobs, eight_scripts=2))])
    return capsys.readouterr().out


def test_extrapolated_script_times_name_the_number_of_measured_scripts(tmp_path, monkeypatch, capsys) -> None:
    table = table_of(8, tmp_path, monkeypatch, capsys)

    for name in ("scripts one after another", "scripts two at a time"):
        assert f"eight_jobs: {name.capitalize()}, extrapolated from 2: wall-clock time" in table
        assert f"eight_jobs: Speedup over {name}, extrapolated from 2" in table
    assert "jobs, extrapolated" not in table


def test_measured_script_times_have_no_extrapolation_note(tmp_path, monkeypatch, capsys) -> None:
    table = table_of(2, tmp_path, monkeypatch, capsys)

    assert "eight_jobs: Scripts one after another: wall-clock time" in table
    assert "extrapolated" not in table
