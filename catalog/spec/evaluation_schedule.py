"""Whether evaluations come in time to decide anything. A job is always evaluated at its start and its end."""

from __future__ import annotations

from catalog.errors import InvalidRequest
from catalog.spec.job import JobSpec


def most_steps(spec: JobSpec, num_rows: int) -> int | None:
    """That a job over a file of so many rows can have, before it is known how many of them are usable: texts that are
    split become more, and else some may be left out. None where nothing bounds them."""
    return spec.max_steps if spec.data.overflow == "split" else spec.num_steps(num_rows)


def come_too_late(spec: JobSpec, num_steps: int | None) -> bool:
    """Whether there is none between start and end, where a number was asked for."""
    every = spec.evaluate_every_steps
    return every is not None and num_steps is not None and every > num_steps


def decide(spec: JobSpec) -> bool:
    """Whether the result depends on them."""
    return spec.early_stopping is not None or spec.keep == "best"


def check_in_time(spec: JobSpec, num_steps: int | None) -> None:
    """num_steps: the most that there can be. Raises InvalidRequest where evaluations are to decide, and none can."""
    if not decide(spec) or not come_too_late(spec, num_steps):
        return
    field = "evaluation.keep 'best'" if spec.early_stopping is None else "early_stopping"
    raise InvalidRequest(
        f"{field} can't act: evaluation.every_steps is {spec.evaluate_every_steps}, and the job has {num_steps} steps "
        "at most.",
        code="no_evaluation_in_time",
        remedy="Lower evaluation.every_steps to a part of that, or leave it out for ten evaluations over the job.",
        param="evaluation.every_steps",
    )


def too_late(spec: JobSpec, num_steps: int) -> str:
    """What a job's events tell then."""
    sentence = (
        f"evaluation.every_steps is {spec.evaluate_every_steps}, and the job has {num_steps} steps at most: the "
        "validation file is read at the start and at the end alone"
    )
    return (
        f"{sentence}, so that nothing ends the job early, and it keeps its last weights" if decide(spec) else sentence
    )
