"""Sweeps and their trials as the service answers, in the way of `models`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lorry.models.jobs import FINAL_STATUSES, JobFailure, Progress, View


@dataclass(frozen=True, kw_only=True)
class Trial(View):
    """One job of a sweep, as the leaderboard has it."""

    id: str = ""
    """Of its job."""
    sweep_id: str = ""
    number: int = 0
    parameters: dict[str, Any] = field(default_factory=dict[str, Any])
    status: str = ""
    phase: str | None = None
    """Of a running trial: loading, training or verifying."""
    reason: str | None = None
    value: float | None = None
    """Of the objective, as measured last."""
    step: int | None = None
    rung: int | None = None
    stopped: str | None = None
    """Why it was ended before its last step."""
    progress: Progress = field(default_factory=Progress, metadata={"view": Progress})
    fine_tuned_model: str | None = None

    @property
    def is_final(self) -> bool:
        return self.status in FINAL_STATUSES


@dataclass(frozen=True, kw_only=True)
class Sweep(View):
    """Several jobs that differ in stated fields."""

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
    """Trials by status."""
    best_trial: Trial | None = field(default=None, metadata={"view": Trial})
    best_adapter: str | None = None
    fine_tuned_model: str | None = None
    """The best trial's adapter, once the sweep has ended. The sweep's id names it too."""
    error: JobFailure | None = field(default=None, metadata={"view": JobFailure})

    @property
    def is_final(self) -> bool:
        return self.status in FINAL_STATUSES
