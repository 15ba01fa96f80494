"""Scores of the trials of a sweep, recorded in the transaction that records the metric itself.

The decision whether a trial continues therefore needs only the database, and no running API server. A decision to stop
is stored as a cancel request. The worker that holds the job applies it like a user's request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from pydantic import ValidationError
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from catalog.db.database import get_once, serialize
from catalog.errors import Conflict, NotFound
from catalog.history import events
from catalog.search.asha import Rungs
from catalog.search.design import Design, designed
from catalog.search.spec import Objective, SweepRequest
from catalog.spec.validation_messages import Problem, expectation, field_path
from catalog.states import FINAL_STATES, EndReason, JobState
from catalog.tables.jobs import Job
from catalog.tables.sweeps import RungValue, Sweep, Trial

RECENT_STEPS = 10
"""Steps over which a training metric is averaged, because a single batch may be unusually hard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """The value of a curve point by which a sweep compares its trials."""

    kind: str
    field: str
    reward: str | None
    direction: float
    """1 if lower is better, else -1."""

    def score(self, point: Mapping[str, Any]) -> float | None:
        """Return the score, of which lower is better; None if the point has no such finite value."""
        if point["kind"] != self.kind:
            return None
        rewards: Mapping[str, Any] = point["rewards"] or {}
        value: float | None = rewards.get(self.reward) if self.reward else point[self.field]
        return None if value is None or not math.isfinite(value) else self.direction * value


def measure_of(sweep: Sweep) -> Measure:
    objective = Objective.model_validate(sweep.requested.get("objective") or {})
    kind, _, name = objective.metric.partition("_")
    direction = 1.0 if objective.resolved_goal() == "minimize" else -1.0
    field = "loss" if name == "loss" else "token_accuracy"
    reward = name.removeprefix("reward_") if name.startswith("reward_") else None
    return Measure(kind=kind, field=field, reward=reward, direction=direction)


def observe(session: Session, job: Job, points: Sequence[Mapping[str, Any]], *, now: float) -> bool:
    """Record the points of a trial, whose job is locked. Return whether it must stop; False if the job is no trial."""
    trial = trial_of(session, job)
    if trial is None:
        return False
    sweep = session.get_one(Sweep, trial.sweep_id)
    measure, rungs = measure_of(sweep), rungs_of(sweep)
    for point in sorted(points, key=lambda point: point["step"]):
        score = measure.score(point)
        if score is None or point["step"] == 0:  # step 0 measures the base model, not the trial
            continue
        trial.step, trial.score = point["step"], _smoothed(trial, measure, point["step"], score)
        if rungs is not None and job.num_steps is not None and trial.stopped is None:
            rung = rungs.at(point["step"], num_steps=job.num_steps)
            if rung is not None and not _continues(session, trial, rung, rungs):
                stop(session, job, trial, _at_a_rung(sweep, rung, point["step"]), now=now)
    return trial.stopped is not None


def stop(session: Session, job: Job, trial: Trial, why: str, *, now: float) -> None:
    """Request that the worker stops the trial, which then finishes as `pruned`.

    Nothing happens if it was already stopped or cancelled.
    """
    if trial.stopped is None and not job.cancel_requested:
        trial.stopped, job.cancel_requested = why, True
        events.add(session, job.id, now=now, message=f"The trial was stopped. {why}.", data={"step": trial.step})


def completed(session: Session, job: Job, point: Mapping[str, Any] | None) -> None:
    """Set the final score of a trial to that of its adapter. `point`: the evaluation at the step that it keeps."""
    trial = trial_of(session, job)
    if trial is None:
        return
    trial.stopped = None  # it succeeded before its worker applied the stop request
    score = None if point is None else measure_of(session.get_one(Sweep, trial.sweep_id)).score(point)
    if score is not None and point is not None:
        trial.step, trial.score = point["step"], score


def ended_for(session: Session, job: Job, reason: EndReason) -> EndReason:
    """Return the end reason of a cancelled job: `PRUNED` if it was stopped as a trial, else `reason`."""
    trial = trial_of(session, job)
    return EndReason.PRUNED if trial is not None and trial.stopped is not None else reason


def on_transition(session: Session, job: Job, before: JobState | None, *, now: float) -> None:
    """Mark the sweep of a finished trial as due: it may create further trials, or be finished itself."""
    if job.sweep_id is not None and job.state in FINAL_STATES:
        sweep = get_once(session, Sweep, job.sweep_id, lock="update")
        assert sweep is not None
        if sweep.finished_at is None:
            sweep.due_at = now


def trial_of(session: Session, job: Job) -> Trial | None:
    return None if job.sweep_id is None else session.get_one(Trial, job.id)


def _smoothed(trial: Trial, measure: Measure, step: int, score: float) -> float:
    if measure.kind != "train":
        return score
    earlier = [(at, value) for at, value in (trial.recent or {}).get("scores", ()) if at < step]
    kept = [*earlier, (step, score)][-RECENT_STEPS:]
    trial.recent = {"scores": kept}
    return sum(value for _, value in kept) / len(kept)


def _continues(session: Session, trial: Trial, rung: int, rungs: Rungs) -> bool:
    """Record the trial's score at the rung, and compare it with the trials that have reached the rung.

    A step that is repeated after a resume does not change the earlier decision.
    """
    if session.get(RungValue, (trial.job_id, rung)) is not None:
        return True
    serialize(session, f"rungs of {trial.sweep_id}")  # otherwise trials at the same time would not count each other
    session.add(RungValue(job_id=trial.job_id, rung=rung, sweep_id=trial.sweep_id, score=trial.score))
    trial.rung = rung
    session.flush()
    at_rung = select(func.count()).where(RungValue.sweep_id == trial.sweep_id, RungValue.rung == rung)
    num_better = session.scalar(at_rung.where(RungValue.score < trial.score)) or 0
    return rungs.continues(num_better=num_better, num_competing=session.scalar(at_rung) or 1)


def _at_a_rung(sweep: Sweep, rung: int, step: int) -> str:
    factor = (sweep.rungs or {})["reduction_factor"]
    return f"At rung {rung}, step {step}, it was not among the best 1/{factor} of the trials that have reached it"


def design_of(sweep: Sweep) -> Design:
    """Return the design of a stored sweep. Raises Conflict if it is from an older version and is not valid any more."""
    try:
        request = SweepRequest.model_validate(sweep.requested)
    except ValidationError as error:
        raise Conflict(
            f"Sweep {sweep.id} can't create more trials, because this version of Lorry rejects its request: "
            f"{_first(error, sweep.requested)}.",
            code="sweep_outdated",
            remedy="Create a new sweep for the remaining trials.",
        ) from error
    return replace(designed(request, seed=sweep.seed), rungs=rungs_of(sweep))


def _first(error: ValidationError, requested: Mapping[str, Any]) -> str:
    """Return the first problem, as `'lora.rank' must be at least 1`."""
    problem = cast(Problem, error.errors(include_url=False)[0])
    place = field_path(problem["loc"], requested, is_missing=problem["type"] == "missing")
    match problem["type"]:
        case "missing":
            return f"{place!r} is missing"
        case "extra_forbidden":
            return f"there is no field {place!r}"
        case _:
            text = expectation([problem])
            return f"{place!r} {text}" if place else text.removeprefix("is invalid: ")


def rungs_of(sweep: Sweep) -> Rungs | None:
    return None if sweep.rungs is None else Rungs(**sweep.rungs)


def find_sweep(session: Session, project_id: str, sweep_id: str, *, locked: bool = False) -> Sweep:
    """Return a sweep of the project. Raises NotFound.

    `locked`: no other transaction can create or add a trial meanwhile. Lock jobs before the sweep, never after it.
    """
    own = select(Sweep).where(Sweep.id == sweep_id, Sweep.project_id == project_id)
    sweep = session.scalar(own.with_for_update(of=Sweep) if locked else own)
    if sweep is None:
        raise NotFound("sweep", sweep_id)
    return sweep


def find_trial(session: Session, sweep: Sweep, number: int) -> Trial:
    """Return the trial with this number. Raises NotFound."""
    own = select(Trial).where(Trial.sweep_id == sweep.id, Trial.number == number)
    trial = session.scalar(own) if 0 <= number < sweep.num_created else None
    if trial is None:
        last, path = sweep.num_created - 1, f"/v1/sweeps/{sweep.id}/trials"
        remedy = (
            f"Use a number from 0 to {last}: GET {path} lists the trials." if last > 0 else "Use 0, the only trial."
        )
        if sweep.num_created == 0:
            remedy = "Create a new sweep." if sweep.is_closed else f"Create the first trial with POST {path}."
        makes_more = not sweep.is_closed and sweep.requested["search"]["type"] != "ask_tell"
        is_coming = makes_more and sweep.num_created <= number < sweep.num_trials
        if is_coming:
            remedy = f"Send the request again once GET {path} lists the trial."
        raise NotFound(
            "trial",
            str(number),
            message=f"Trial {number} of sweep {sweep.id} has not been created yet."
            if is_coming
            else f"Sweep {sweep.id} has no trial {number}.",
            remedy=remedy,
        )
    return trial
