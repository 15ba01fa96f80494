"""Checks that a job has evaluations between its start and its end, if it needs them.

A job is always evaluated at its start and its end.
"""

from __future__ import annotations

from catalog.error_texts import ErrorText
from catalog.errors import InvalidRequest
from catalog.spec.job import JobSpec


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
    raise InvalidRequest(
        "no_evaluation_in_time" if num_steps > 1 else "no_evaluation_in_one_step",
        field="evaluation.keep 'best'" if spec.early_stopping is None else "early_stopping",
        every_steps=spec.evaluation.every_steps or 0,
        num_steps=num_steps,
        param="evaluation.every_steps",
    )


def too_late(spec: JobSpec, num_steps: int) -> ErrorText:
    """Return the warning for a job whose evaluation interval is longer than the job."""
    every_steps = spec.evaluation.every_steps or 0
    if num_steps <= 1:
        return ErrorText.of("evaluations_too_late_for_one_step", every_steps=every_steps)
    if decide(spec):
        return ErrorText.of("deciding_evaluations_too_late", every_steps=every_steps, num_steps=num_steps)
    return ErrorText.of("evaluations_too_late", every_steps=every_steps, num_steps=num_steps)
