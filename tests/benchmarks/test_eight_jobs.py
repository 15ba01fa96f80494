"""A time of eight scripts that follows from fewer is told as such."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import eight_jobs
from benchmarks.results import print_table
from tests.benchmarks.toy_plan import toy_plan


class Script:
    """Stands in for a script's process."""

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


def test_the_time_of_eight_scripts_says_that_two_were_run(tmp_path, monkeypatch, capsys) -> None:
    table = table_of(8, tmp_path, monkeypatch, capsys)

    for name in ("scripts one after another", "scripts two at a time"):
        assert f"eight_jobs: {name}, from 2 of them, seconds" in table
        assert f"eight_jobs: {name}, from 2 of them, over lorry" in table
    assert "lorry, from" not in table


def test_nothing_is_said_where_every_script_was_run(tmp_path, monkeypatch, capsys) -> None:
    table = table_of(2, tmp_path, monkeypatch, capsys)

    assert "eight_jobs: scripts one after another, seconds" in table
    assert "of them" not in table
