"""Schemas of plans, the dry runs of jobs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas.errors import StoredError
from api.schemas.jobs import (
    DataObject,
    EvaluationObject,
    LoraObject,
    MethodObject,
    OptimizerObject,
    ResolvedHyperparameters,
    ScheduleObject,
    configuration,
)
from catalog.plans.plans import FileDetails
from catalog.resources.sharding import Strategy
from catalog.spec.job import JobSpec
from catalog.spec.training import EarlyStopping
from catalog.tables.plans import Plan

EXAMPLE: dict[str, Any] = {
    "id": "plan-5e1f0a9b8c7d6e5f4a3b2c1d",
    "object": "plan",
    "created_at": 1790000000,
    "expires_at": 1790604800,
    "status": "ready",
    "model": "smollm2-135m",
    "training_file": "file-3f2b8c9d0a1e4f5a6b7c8d9e",
    "num_steps": 60,
    "trainable_parameters": 4884480,
    "training_time": {
        "seconds": 160.0,
        "min_seconds": 128.0,
        "max_seconds": 240.0,
        "basis_kind": "measured",
        "basis": "Measured on worker w1 (CPU, 2 cores) with this base.",
        "tokens_per_second": 480.0,
        "worker_id": "w1",
    },
    "warnings": [
        {"code": "no_validation_file", "message": "There is no validation file.", "remedy": "Hold back some rows."}
    ],
}


class PlanConfiguration(BaseModel):
    """The configuration that the job would have, with every `auto` resolved."""

    parent_adapter: str | None
    seed: int
    hyperparameters: ResolvedHyperparameters
    method: MethodObject
    lora: LoraObject
    optimizer: OptimizerObject
    schedule: ScheduleObject
    evaluation: EvaluationObject
    data: DataObject
    early_stopping: EarlyStopping | None
    precision: str
    quantization: str
    max_length: int
    max_steps: int | None
    checkpoint_every_steps: int


class ShownToken(BaseModel):
    text: str
    id: int
    is_trained: bool = Field(description="Whether the token counts in the loss.")


class Segment(BaseModel):
    """Consecutive tokens. A long row is shown as two segments."""

    start: int
    tokens: list[ShownToken]


class ShownRow(BaseModel):
    part: str | None = Field(description="For a pair: chosen or rejected.")
    num_tokens: int = Field(description="Number of tokens in training, after truncation.")
    whole_tokens: int = Field(description="Number of tokens before truncation.")
    trained_tokens: int
    segments: list[Segment]


class SampleRow(BaseModel):
    line: int
    flaws: list[str] = Field(description="too_long, empty, duplicate.")
    rows: list[ShownRow] = Field(description="One row; two for a pair.")


class PlannedFile(BaseModel):
    """The data report of a file; see GET /v1/files/{file_id}/report."""

    model_config = ConfigDict(extra="allow")
    rows: int
    usable_rows: int
    tokens: int
    supervised_tokens: int
    truncated_rows: int
    dropped_rows: int
    split_rows: int
    empty_rows: int
    duplicate_rows: int
    longest_row: int
    lines: dict[str, list[int]] | None = Field(
        default=None,
        description="First lines that are too_long, empty or duplicate. Null without the scope files:read.",
    )
    samples: list[SampleRow] | None = Field(
        default=None, description="Sample rows with their tokens. Null without the scope files:read, and in lists."
    )


class Overlap(BaseModel):
    rows: int = Field(description="Number of validation rows that are also in the training file.")
    of_rows: int


class PlannedData(BaseModel):
    training: PlannedFile
    validation: PlannedFile | None
    overlap: Overlap | None = Field(description="Null without a validation file.")


class MemoryPart(BaseModel):
    part: str
    bytes: int
    description: str


class PlannedMemory(BaseModel):
    """Memory on one device if the job trains alone. With packmates, theirs is added; the base model is shared."""

    kind: Literal["cuda", "cpu"]
    num_devices: int = Field(default=1, description="Size of the device group. Several: a group that currently exists.")
    strategy: Strategy = Field(
        default="replicated",
        description="How the base model is held: replicated on each device, or sharded across the devices, with the "
        "shards in device memory or offloaded to the host's memory.",
    )
    total_bytes: int
    host_bytes: int = Field(default=0, description="Host memory for the offloaded shards of the base model.")
    parts: list[MemoryPart]


class GpuSize(BaseModel):
    gigabytes: int
    memory_bytes: int
    examples: str


class FittingWorker(BaseModel):
    worker_id: str
    name: str
    kind: str
    memory_bytes: int = Field(description="Memory of each of its devices.")
    num_devices: int = 1
    strategy: Strategy = Field(default="replicated", description="How its trainer would hold the base model.")
    needed_bytes: int | None = Field(default=None, description="Memory needed on each device.")


class GpuGroup(GpuSize):
    num_devices: int
    host_bytes: int = Field(default=0, description="Host memory for the offloaded shards of the base model.")


class PlannedDevices(BaseModel):
    smallest_gpu: GpuSize | None = Field(description="Smallest common GPU size that fits; null if none does.")
    groups: list[GpuGroup] = Field(
        default=[], description="Groups of smaller GPUs that fit, with a replicated or sharded base model."
    )
    workers_that_fit: list[FittingWorker] = Field(description="Live workers that fit, smallest first.")
    live_workers: int


class PlanEstimate(BaseModel):
    """An estimate and its basis. If there is no estimate, `basis` explains why."""

    seconds: float | None
    min_seconds: float | None = Field(default=None, description="Shortest likely time. null: there is no range.")
    max_seconds: float | None = Field(default=None, description="Longest likely time. null: there is no range.")
    basis_kind: Literal["measured", "scaled", "guess", "none"]
    basis: str
    tokens_per_second: float | None
    worker_id: str | None


class PlannedUse(BaseModel):
    verdict: Literal["yes", "with_settings", "no"]
    reasons: list[str]


class PlannedUses(BaseModel):
    peft: PlannedUse
    vllm: PlannedUse
    merge: PlannedUse


class PlanWarning(BaseModel):
    code: str
    message: str
    remedy: str


class PlanObject(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": EXAMPLE})

    id: str
    object: Literal["plan"] = "plan"
    created_at: int
    expires_at: int
    status: Literal["computing", "ready", "failed"]
    model: str
    base_digest: str
    training_file: str
    validation_file: str | None
    requested: dict[str, Any] = Field(description="The request as received.")
    configuration: PlanConfiguration
    error: StoredError | None = Field(description="Reason why no job can train on these files.")
    computed_at: int | None = Field(description="Time of the results below. All are null until the plan is ready.")
    data: PlannedData | None = None
    num_steps: int | None = None
    trainable_parameters: int | None = None
    adapted_layers: int | None = None
    memory: list[PlannedMemory] | None = None
    devices: PlannedDevices | None = None
    training_time: PlanEstimate | None = Field(
        default=None, description="Training time, without waiting, loading the base model and verification."
    )
    expected_start: PlanEstimate | None = Field(default=None, description="Seconds from `computed_at` to the start.")
    servable: PlannedUses | None = Field(default=None, description="Whether the adapter can be used elsewhere.")
    warnings: list[PlanWarning] | None = None


class PlanDeleted(BaseModel):
    id: str
    object: Literal["plan"] = "plan"
    deleted: bool = True


def plan_object(row: Plan, details: FileDetails | None = None) -> PlanObject:
    """Return a plan's response. `details`: sample rows and line numbers, if the caller may see them."""
    found = dict(row.found or {})
    if found:
        reports: dict[str, Any] = found["data"]
        known = {"training": details.training, "validation": details.validation} if details else {}
        files = {
            name: report and {**report, **(known.get(name) or {})}
            for name, report in reports.items()
            if name != "overlap"
        }
        found["data"] = {**files, "overlap": reports["overlap"]}
        found["computed_at"] = int(found["computed_at"])
    return PlanObject.model_validate(
        {
            "id": row.id,
            "created_at": int(row.created_at),
            "expires_at": int(row.expires_at),
            "status": row.state,
            "model": row.base_model,
            "base_digest": row.base_digest,
            "training_file": row.training_file,
            "validation_file": row.validation_file,
            "requested": row.requested,
            "configuration": configuration(JobSpec.model_validate(row.spec)),
            "error": row.error,
            "computed_at": None,
            **found,
        }
    )
