"""A plan, as the service tells it: what a job would come to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lorry.models.jobs import JobFailure, View


@dataclass(frozen=True, kw_only=True)
class Estimate(View):
    """Seconds with their basis; None where there is no telling, and the basis says why."""

    seconds: float | None = None
    basis_kind: str = "none"
    """measured, scaled, guess or none."""
    basis: str = ""
    tokens_per_second: float | None = None
    worker_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plan(View):
    """All but what was asked for is empty until it is ready."""

    id: str = ""
    status: Literal["computing", "ready", "failed"] = "computing"
    created_at: int = 0
    expires_at: int = 0
    model: str = ""
    training_file: str = ""
    validation_file: str | None = None
    configuration: dict[str, Any] = field(default_factory=dict[str, Any])
    """As the job would have it, with every "auto" resolved."""
    requested: dict[str, Any] = field(default_factory=dict[str, Any])
    error: JobFailure | None = field(default=None, metadata={"view": JobFailure})
    """Why no job could train on these files."""
    data: dict[str, Any] = field(default_factory=dict[str, Any])
    """training, validation: what preparation found, with sample rows; overlap."""
    num_steps: int | None = None
    trainable_parameters: int | None = None
    adapted_layers: int | None = None
    memory: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """By kind of device: total_bytes and parts."""
    devices: dict[str, Any] = field(default_factory=dict[str, Any])
    training_time: Estimate = field(default_factory=Estimate, metadata={"view": Estimate})
    expected_start: Estimate = field(default_factory=Estimate, metadata={"view": Estimate})
    servable: dict[str, Any] = field(default_factory=dict[str, Any])
    """peft, vllm, merge: verdict and reasons."""
    warnings: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
