"""Typed response for a plan, the dry run of a job."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lorry.models.jobs import JobFailure, View


@dataclass(frozen=True, kw_only=True)
class Estimate(View):
    """Estimated seconds and their basis. None if there is no estimate; `basis` then explains why."""

    seconds: float | None = None
    min_seconds: float | None = None
    max_seconds: float | None = None
    """This and the one above: the likely range. None if there is none."""
    basis_kind: str = "none"
    """measured, scaled, guess or none."""
    basis: str = ""
    tokens_per_second: float | None = None
    worker_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plan(View):
    """A plan. All fields except the request are empty until it is ready."""

    id: str = ""
    status: Literal["computing", "ready", "failed"] = "computing"
    created_at: int = 0
    expires_at: int = 0
    model: str = ""
    training_file: str = ""
    validation_file: str | None = None
    configuration: dict[str, Any] = field(default_factory=dict[str, Any])
    """The configuration that the job would have, with every "auto" resolved."""
    requested: dict[str, Any] = field(default_factory=dict[str, Any])
    error: JobFailure | None = field(default=None, metadata={"view": JobFailure})
    """Reason why no job can train on these files."""
    data: dict[str, Any] = field(default_factory=dict[str, Any])
    """training, validation: data reports with sample rows; overlap."""
    num_steps: int | None = None
    trainable_parameters: int | None = None
    adapted_layers: int | None = None
    memory: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """total_bytes and parts, for each kind of device."""
    devices: dict[str, Any] = field(default_factory=dict[str, Any])
    training_time: Estimate = field(default_factory=Estimate, metadata={"view": Estimate})
    expected_start: Estimate = field(default_factory=Estimate, metadata={"view": Estimate})
    servable: dict[str, Any] = field(default_factory=dict[str, Any])
    """peft, vllm, merge: verdict and reasons."""
    warnings: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
