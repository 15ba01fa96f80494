"""Schemas of sweeps and of their trials on the leaderboard."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas import CreatedAt, ObjectId
from api.schemas.errors import StoredError
from api.schemas.jobs import Phase, phase_of
from catalog.spec.model_fields import resolved_schema
from catalog.spec.sweep import Goal, Metric, Objective, SearchType, SweepRequest, SweepState
from catalog.sweeps.queries import SweepView, TrialView

TRIAL_EXAMPLE: dict[str, Any] = {
    "id": "ftjob-1c0ffee0a1b2c3d4e5f60718",
    "object": "sweep.trial",
    "sweep_id": "sweep-8a0b1c2d3e4f5a6b7c8d9e0f",
    "number": 7,
    "parameters": {"lora.rank": 16, "optimizer.learning_rate": 0.000412},
    "status": "succeeded",
    "phase": None,
    "reason": "completed",
    "value": 1.183,
    "step": 120,
    "rung": 1,
    "stopped": None,
    "progress": {"step": 120, "num_steps": 120},
    "fine_tuned_model": "ft:smollm2-135m:search:docs:e5f60718",
}
SWEEP_EXAMPLE: dict[str, Any] = {
    "id": "sweep-8a0b1c2d3e4f5a6b7c8d9e0f",
    "object": "sweep",
    "created_at": 1790000000,
    "finished_at": None,
    "status": "running",
    "model": "smollm2-135m",
    "suffix": "docs",
    "training_file": "file-3f2b8c9d0a1e4f5a6b7c8d9e",
    "validation_file": "file-4a3b8c9d0a1e4f5a6b7c8d9e",
    "parameters": {"lora.rank": {"values": [4, 8, 16]}},
    "search": {"type": "tpe", "trials": 20, "seed": 7, "pruner": "asha", "min_steps": 10, "reduction_factor": 3},
    "objective": {"metric": "valid_loss", "goal": "minimize"},
    "keep_adapters": "all",
    "max_concurrent": None,
    "num_trials": 20,
    "num_created": 20,
    "counts": {"succeeded": 3, "running": 5, "cancelled": 12},
    "is_closed": False,
    "cancel_requested": False,
    "best_trial": TRIAL_EXAMPLE,
    "best_adapter": None,
    "fine_tuned_model": None,
    "error": None,
    "requested": {"model": "smollm2-135m"},
}


COLUMNS = ("max_concurrent", "num_trials", "num_created", "is_closed", "cancel_requested", "error")
"""Fields of a sweep that are columns."""


class TrialObject(BaseModel):
    """A trial of a sweep: one job with its values of the varied fields."""

    model_config = ConfigDict(json_schema_extra={"example": TRIAL_EXAMPLE})

    id: str = Field(description="ID of the trial's job.")
    object: Literal["sweep.trial"] = "sweep.trial"
    sweep_id: str = Field(description="ID of the sweep to which it belongs.")
    number: int = Field(description="Number of the trial, from 0.")
    parameters: dict[str, Any] = Field(description="Values of the varied job fields, by dotted path.")
    status: str = Field(description="Status of the job.")
    phase: Phase | None = Field(description="Phase of the job while it runs.")
    reason: str | None = Field(description="Reason why the job ended. `pruned`: the sweep or its client stopped it.")
    value: float | None = Field(description="Last measured value of the objective; null before the first.")
    step: int | None = Field(description="Optimizer step at which the value was measured.")
    rung: int | None = Field(description="Last rung that the trial reached, from 0.")
    stopped: str | None = Field(description="Reason why the trial was stopped before its last step.")
    progress: dict[str, Any] | None = Field(description="Progress of the job.")
    fine_tuned_model: str | None = Field(description="Name of the trained adapter; null until the job has succeeded.")


class SearchObject(BaseModel):
    """The search for parameters, with all settings resolved."""

    type: SearchType = Field(description="Search method of the sweep.")
    trials: int = Field(description="Number of trials.")
    seed: int = Field(description="Seed for sampling, given or drawn.")
    pruner: Literal["asha"] | None = Field(description="Method that stops bad trials early; null: no trial is stopped.")
    min_steps: int | None = Field(description="Optimizer step of the first rung. Null without a pruner.")
    reduction_factor: int | None = Field(
        description="At each rung, the best 1 of this many trials continues. Null without a pruner."
    )


class ObjectiveObject(BaseModel):
    """The metric by which trials are compared."""

    metric: Metric = Field(description="Metric of a trial that counts.")
    goal: Goal = Field(description="Whether lower or higher values are better.")


class SweepObject(BaseModel):
    """A group of jobs that differ in chosen fields, ranked by an objective."""

    model_config = ConfigDict(json_schema_extra=resolved_schema(SweepRequest, SWEEP_EXAMPLE))

    id: ObjectId
    object: Literal["sweep"] = "sweep"
    created_at: CreatedAt
    finished_at: int | None = Field(description="Time at which the last trial ended, in Unix seconds; null before.")
    status: SweepState = Field(
        description="`succeeded`: all trials have finished, and at least one has an adapter. `failed`: none has one."
    )
    model: str = Field(description="Name of the base model, or of the adapter to continue.")
    suffix: str | None
    training_file: str
    validation_file: str | None
    parameters: dict[str, Any] = Field(
        description="The varied fields by dotted path, each with its values or its range."
    )
    search: SearchObject = Field(description="The search method, with all settings resolved.")
    objective: ObjectiveObject = Field(description="The metric by which trials are compared, resolved.")
    keep_adapters: Literal["all", "best"]
    max_concurrent: int | None
    num_trials: int = Field(description="Number of trials to create.")
    num_created: int = Field(description="Number of trials created so far.")
    counts: dict[str, int] = Field(description="Number of created trials by status.")
    is_closed: bool = Field(description="Whether no further trial is created.")
    cancel_requested: bool = Field(description="Whether the cancellation of the sweep is requested.")
    best_trial: TrialObject | None = Field(description="Best of the trials that have succeeded so far.")
    best_adapter: str | None = Field(description="ID of the best trial's adapter, once the sweep has finished.")
    fine_tuned_model: str | None = Field(
        description="Name of the best adapter. `/v1/adapters` also accepts the sweep's ID for it."
    )
    error: StoredError | None = Field(description="Problem that ended the sweep; null if there is none.")
    requested: dict[str, Any] = Field(description="The request as received.")


def sweep_object(view: SweepView) -> SweepObject:
    row, best = view.sweep, view.best
    requested: dict[str, Any] = row.requested
    objective = Objective.model_validate(requested.get("objective") or {})
    rungs: dict[str, Any] = {"pruner": None, "min_steps": None, "reduction_factor": None}
    if row.rungs is not None:
        rungs |= {"pruner": "asha", **row.rungs}
    is_kept = row.finished_at is not None and view.best_adapter is not None
    return SweepObject.model_validate(
        {
            "id": row.id,
            "created_at": int(row.created_at),
            "finished_at": None if row.finished_at is None else int(row.finished_at),
            "status": row.state,
            **{name: requested.get(name) for name in ("model", "suffix", "training_file", "validation_file")},
            "parameters": requested.get("parameters") or {},
            "search": {"type": requested["search"]["type"], "trials": row.num_trials, "seed": row.seed, **rungs},
            "objective": {"metric": objective.metric, "goal": objective.resolved_goal()},
            "keep_adapters": requested.get("keep_adapters") or "all",
            **{name: getattr(row, name) for name in COLUMNS},
            "counts": view.counts,
            "best_trial": None if best is None else trial_object(best),
            "best_adapter": view.best_adapter if is_kept else None,
            "fine_tuned_model": best.job.adapter_name if is_kept and best is not None else None,
            "requested": requested,
        }
    )


def trial_object(view: TrialView) -> TrialObject:
    row, job = view.trial, view.job
    return TrialObject(
        id=job.id,
        sweep_id=row.sweep_id,
        number=row.number,
        parameters=row.parameters,
        status=job.state,
        phase=phase_of(job),
        reason=job.reason,
        value=view.value,
        step=row.step,
        rung=row.rung,
        stopped=row.stopped,
        progress=job.progress,
        fine_tuned_model=job.adapter_name,
    )
