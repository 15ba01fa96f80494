"""Typed responses for sweeps and their trials."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lorry.models.jobs import FINAL_STATUSES, JobFailure, Progress, View


@dataclass(frozen=True, kw_only=True)
class Trial(View):
    """One job of a sweep, as shown on the leaderboard."""

    id: str = ""
    """Id of the trial's job."""
    sweep_id: str = ""
    number: int = 0
    parameters: dict[str, Any] = field(default_factory=dict[str, Any])
    status: str = ""
    phase: str | None = None
    """Phase of a running trial: loading, training or verifying."""
    reason: str | None = None
    value: float | None = None
    """Last measured value of the objective."""
    step: int | None = None
    rung: int | None = None
    stopped: str | None = None
    """Reason why it was stopped before its last step."""
    progress: Progress = field(default_factory=Progress, metadata={"view": Progress})
    fine_tuned_model: str | None = None

    @property
    def is_final(self) -> bool:
        """Whether its status is succeeded, failed or cancelled."""
        return self.status in FINAL_STATUSES


@dataclass(frozen=True, kw_only=True)
class Sweep(View):
    """A group of jobs that differ in chosen fields."""

    id: str = ""
    status: str = ""
    model: str = ""
    suffix: str | None = None
    created_at: int = 0
    finished_at: int | None = None
    parameters: dict[str, Any] = field(default_factory=dict[str, Any])
    search: dict[str, Any] = field(default_factory=dict[str, Any])
    objective: dict[str, Any] = field(default_factory=dict[str, Any])
    num_trials: int = 0
    num_created: int = 0
    counts: dict[str, int] = field(default_factory=dict[str, int])
    """Number of trials by status."""
    best_trial: Trial | None = field(default=None, metadata={"view": Trial})
    best_adapter: str | None = None
    fine_tuned_model: str | None = None
    """Name of the best trial's adapter, once the sweep has finished. The sweep's id is accepted as well."""
    error: JobFailure | None = field(default=None, metadata={"view": JobFailure})

    @property
    def is_final(self) -> bool:
        """Whether its status is succeeded, failed or cancelled."""
        return self.status in FINAL_STATUSES
