"""Checks that a job has evaluations between its start and its end, if it needs them.

A job is always evaluated at its start and its end.
"""

from __future__ import annotations

from catalog.errors import InvalidRequest
from catalog.spec.job import JobSpec


def evaluate_often(num_steps: int) -> str:
    """Return the remedy for an evaluation interval that is longer than the job."""
    if num_steps <= 1:
        return "Omit evaluation.every_steps, or train for more steps (max_steps or n_epochs)."
    return f"Set evaluation.every_steps to less than {num_steps:,}, or omit it to use an interval that suits the job."


def most_steps(spec: JobSpec, num_rows: int) -> int | None:
    """Return the maximum steps of a job over a file of `num_rows`, before the number of usable rows is known.

    Split texts can become more rows; otherwise some rows may be skipped. None if there is no bound.
    """
    return spec.max_steps if spec.data.overflow == "split" else spec.num_steps(num_rows)


def interval_is_too_long(spec: JobSpec, num_steps: int | None) -> bool:
    """Return whether the requested evaluation interval is longer than the job."""
    every = spec.evaluation.every_steps
    return every is not None and num_steps is not None and every > num_steps


def decide(spec: JobSpec) -> bool:
    """Return whether the result of the job depends on its evaluations."""
    return spec.early_stopping is not None or spec.evaluation.keep == "best"


def check_in_time(spec: JobSpec, num_steps: int | None) -> None:
    """Raises InvalidRequest if the result depends on evaluations and none comes in time. `num_steps`: the maximum."""
    if not decide(spec) or not interval_is_too_long(spec, num_steps):
        return
    assert num_steps is not None
    field = "evaluation.keep 'best'" if spec.early_stopping is None else "early_stopping"
    raise InvalidRequest(
        f"{field} requires evaluations during training, but evaluation.every_steps is {spec.evaluation.every_steps} "
        f"and the job has at most {_steps(num_steps)}.",
        code="no_evaluation_in_time",
        remedy=evaluate_often(num_steps),
        param="evaluation.every_steps",
    )


def too_late(spec: JobSpec, num_steps: int) -> str:
    """Return the warning for a job whose evaluation interval is longer than the job."""
    sentence = (
        f"evaluation.every_steps is {spec.evaluation.every_steps}, but the job has at most {_steps(num_steps)}, so "
        "the validation loss is measured only at the start and at the end"
    )
    effect = ". The job will not stop early and will keep its last weights" if decide(spec) else ""
    return f"{sentence}{effect}."


def _steps(number: int) -> str:
    return "1 step" if number == 1 else f"{number} steps"
