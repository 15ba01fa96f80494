"""The promised slowdown is checked on the pack that was admitted, not on a smaller one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pack_scaling
from benchmarks.results import Result
from tests.benchmarks.toy_plan import toy_plan

WARM_UP = [8, *[1, 2, 4, 8] * 2]
"""A step of the largest size, and twice all sizes, none of which is measured."""


class Machine:
    """Replaces the contender's process. A tick takes `seconds[jobs]`."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds
        self.requested: list[int] = []

    def __call__(self, *_: Any, **__: Any) -> Machine:
        return self

    def step(self, *, jobs: int) -> dict[str, float]:
        self.requested.append(jobs)
        return {"tokens": 16 * jobs, "seconds": self.seconds[jobs], "bytes": 1000 + jobs}

    def close(self) -> None:
        pass


def measured_on(machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    monkeypatch.setattr(pack_scaling, "Contender", machine)
    return pack_scaling.run(replace(toy_plan(folder), pack_sizes=(1, 2, 4, 8), pack_warm_up=2))


def test_unplanned_pack_size_is_measured_together_with_one_job(tmp_path, monkeypatch) -> None:
    machine = Machine({1: 1.0, 2: 1.2, 4: 2.2, 7: 3.9, 8: 5.0})

    result = measured_on(machine, tmp_path, monkeypatch)

    assert machine.requested == [*WARM_UP, 1, 2, 4, 8, 1, 7]
    assert result.figure("Jobs that Lorry admits, 1 lane") == 7
    assert result.figure("7 admitted jobs, 1 lane: slowdown of each job") == pytest.approx(3.9)
    assert not result.misses_a_goal
    assert result.repeats["7_jobs_1_lanes_for_7"] == [{"tokens": 112, "seconds": 3.9, "bytes": 1007}]


def test_slowdown_above_the_promise_is_reported_as_missed(tmp_path, monkeypatch) -> None:
    machine = Machine({1: 1.0, 2: 1.2, 4: 2.2, 7: 4.6, 8: 5.0})

    result = measured_on(machine, tmp_path, monkeypatch)

    (promise,) = [finding for finding in result.findings if finding.goal is not None]
    assert promise.what == "7 admitted jobs, 1 lane: slowdown of each job"
    assert promise.verdict() == "at most 4: missed"


def test_admitted_pack_of_a_planned_size_is_measured_once(tmp_path, monkeypatch) -> None:
    machine = Machine({1: 1.0, 2: 1.1, 4: 1.5, 8: 2.5})

    result = measured_on(machine, tmp_path, monkeypatch)

    assert machine.requested == [*WARM_UP, 1, 2, 4, 8]
    assert result.figure("8 admitted jobs, 1 lane: slowdown of each job") == pytest.approx(2.5)
