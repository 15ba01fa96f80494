"""Decisions of rebuilt Optuna studies: reproducible suggestions, and verdicts at rungs."""

from __future__ import annotations

from typing import Any, Literal

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catalog.spec.sweep import Parameter
from catalog.states import JobState
from catalog.sweeps.study import PastTrial, judge, suggest
from catalog.tables.jobs import Trial

PARAMETERS = {
    path: Parameter.model_validate(fields)
    for path, fields in {
        "optimizer.learning_rate": {"min": 1e-5, "max": 1e-2, "scale": "log"},
        "lora.rank": {"min": 1, "max": 256, "scale": "log"},
        "lora.target_modules": {"values": [["q_proj"], "all-linear", None, True, 1]},
    }.items()
}
Method = Literal["random", "tpe"]


def suggested(numbers: range, method: Method = "random", past: list[PastTrial] | None = None) -> list[dict[str, Any]]:
    return suggest(PARAMETERS, numbers, method=method, seed=7, past=past or [])


def past_trials(num: int, *, num_running: int = 0) -> list[PastTrial]:
    """Trials with random parameters, whose scores are better for smaller ranks."""
    states = [JobState.SUCCEEDED] * (num - num_running) + [JobState.RUNNING] * num_running
    return [
        PastTrial(
            trial=Trial(job_id=f"job-{n}", number=n, parameters=one, step=9, score=float(one["lora.rank"])), state=state
        )
        for n, (one, state) in enumerate(zip(suggested(range(num)), states, strict=True))
    ]


def test_random_samples_depend_only_on_the_seed_and_the_number_of_the_trial() -> None:
    drawn = suggested(range(40))

    assert drawn[25:] == suggested(range(25, 40))
    assert len({str(each) for each in drawn}) == 40
    assert drawn[0] != suggest(PARAMETERS, [0], method="random", seed=8)[0]
    for each in drawn:
        assert 1e-5 <= each["optimizer.learning_rate"] <= 1e-2
        assert type(each["lora.rank"]) is int
        assert each["lora.target_modules"] in (["q_proj"], "all-linear", None, True, 1)
    assert {str(each["lora.target_modules"]) for each in drawn} == {"['q_proj']", "all-linear", "None", "True", "1"}


def test_tpe_learns_from_results_and_repeats_its_decision() -> None:
    past = past_trials(40, num_running=4)

    learned = suggested(range(40, 60), "tpe", past)

    assert learned == suggested(range(40, 60), "tpe", past)
    assert learned[0] == suggested(range(40, 41), "tpe", past)[0]
    assert sum(each["lora.rank"] < 16 for each in learned) > sum(
        each["lora.rank"] < 16 for each in suggested(range(40, 60))
    )


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_failed_stopped_and_unmeasured_trials_are_no_results(method: Method) -> None:
    states = [JobState.FAILED, JobState.CANCELLED, JobState.SUCCEEDED, JobState.PAUSED]
    past = [
        PastTrial(trial=Trial(job_id="j", number=n, parameters=one, score=float("inf")), state=state)
        for n, (one, state) in enumerate(zip(suggested(range(4)), states, strict=True))
    ]
    past[1].trial.stopped = "At a rung"

    assert suggested(range(4, 6), method, past) == suggested(range(4, 6))


@settings(max_examples=40)
@given(
    scores=st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=1, max_size=20),
    factor=st.integers(2, 6),
)
def test_verdicts_from_rows_equal_those_of_a_live_optuna_study(scores: list[tuple[float, float]], factor: int) -> None:
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=2, reduction_factor=factor)
    live = optuna.create_study(pruner=pruner)
    rows: list[Trial] = []

    for number, values in enumerate(scores):
        trial, row = live.ask(), Trial(job_id=f"job-{number}", number=number)
        rows.append(row)
        for rung, value in enumerate(values):
            step = 2 * factor**rung
            trial.report(value, step)
            row.reached_step, row.reached_score = step, value
            verdict = judge({"min_steps": 2, "reduction_factor": factor}, rows, [row.job_id])
            assert verdict == {row.job_id: trial.should_prune()}
            row.reached_step = row.reached_score = None
            assert row.rung == rung
            if verdict[row.job_id]:
                break
