"""Scores of the trials of a sweep, recorded in the transaction that records the metric itself.

The controller of sweeps, in an API server, judges a trial that has reached a rung. A decision to stop is stored as a
cancel request. The worker that holds the job applies it like a user's request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from catalog.db.database import get_once
from catalog.spec.sweep import Objective
from catalog.states import FINAL_STATES, EndReason, JobState
from catalog.tables.jobs import Job, Sweep, Trial

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
    measure = measure_of(sweep)
    for point in sorted(points, key=lambda point: point["step"]):
        score = measure.score(point)
        if score is None or point["step"] == 0:  # step 0 measures the base model, not the trial
            continue
        trial.step, trial.score = point["step"], _smoothed(trial, measure, point["step"], score)
        if _reaches_rung(sweep, job, trial):
            trial.reached_step, trial.reached_score = trial.step, trial.score
            _make_due(session, sweep.id, now=now)
    return trial.stopped is not None


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
        _make_due(session, job.sweep_id, now=now)


def trial_of(session: Session, job: Job) -> Trial | None:
    return None if job.sweep_id is None else session.get_one(Trial, job.id)


def _reaches_rung(sweep: Sweep, job: Job, trial: Trial) -> bool:
    """Return whether the trial is at or beyond its next rung, before its last step. A trial waits for no verdict.

    The steps that a resumed trial repeats are before its next rung, so they decide nothing.
    """
    if sweep.rungs is None or trial.stopped is not None or trial.reached_step is not None:
        return False
    num_rungs = len(trial.pruner_state or {})
    next_rung: int = sweep.rungs["min_steps"] * sweep.rungs["reduction_factor"] ** num_rungs
    assert trial.step is not None
    return job.num_steps is not None and next_rung <= trial.step < job.num_steps


def _make_due(session: Session, sweep_id: str, *, now: float) -> None:
    sweep = get_once(session, Sweep, sweep_id, lock="update")
    assert sweep is not None
    if sweep.finished_at is None:
        sweep.due_at = now


def _smoothed(trial: Trial, measure: Measure, step: int, score: float) -> float:
    if measure.kind != "train":
        return score
    earlier = [(at, value) for at, value in (trial.recent or {}).get("scores", ()) if at < step]
    kept = [*earlier, (step, score)][-RECENT_STEPS:]
    trial.recent = {"scores": kept}
    return sum(value for _, value in kept) / len(kept)
