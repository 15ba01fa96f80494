"""Schemas of plans, the dry runs of jobs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas import BaseDigest, CreatedAt, Deleted, ErrorCode, ErrorMessage, ObjectId, Remedy
from api.schemas.errors import StoredError
from api.schemas.jobs import MethodObject, ResolvedHyperparameters, configuration
from catalog.plans.plans import FileDetails
from catalog.resources.sharding import Strategy
from catalog.spec.data import DataOptions
from catalog.spec.job import JobRequest, JobSpec
from catalog.spec.lora import LoraSpec
from catalog.spec.model_fields import resolved_schema
from catalog.spec.training import EarlyStopping, EvaluationSpec, OptimizerSpec, ScheduleSpec
from catalog.tables.jobs import Plan

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

    model_config = ConfigDict(json_schema_extra=resolved_schema(JobRequest))
    parent_adapter: str | None = Field(
        description="Name of the adapter from which the job would continue; null without one."
    )
    seed: int = Field(description="Seed of everything random in the job, given or drawn.")
    hyperparameters: ResolvedHyperparameters = Field(description="OpenAI's three hyperparameters, resolved.")
    method: MethodObject = Field(description="The training method and its hyperparameters, resolved.")
    lora: LoraSpec = Field(description="The adapter configuration, resolved.")
    optimizer: OptimizerSpec = Field(description="The optimizer, resolved.")
    schedule: ScheduleSpec = Field(description="The learning rate schedule.")
    evaluation: EvaluationSpec = Field(description="The evaluations on the validation file.")
    data: DataOptions = Field(description="How the rows of the files are used.")
    early_stopping: EarlyStopping | None = Field(
        description="Conditions under which the job stops early; null: it trains all steps."
    )
    precision: str = Field(description="Precision of the base model: `bfloat16` or `float32`.")
    quantization: str
    max_length: int = Field(description="Maximum number of tokens of a row.")
    max_steps: int | None
    checkpoint_every_steps: int


class ShownToken(BaseModel):
    """A token of a sample row."""

    text: str = Field(description="Text of the token.")
    id: int = Field(description="Number of the token in the vocabulary.")
    is_trained: bool = Field(description="Whether the token counts in the loss.")


class Segment(BaseModel):
    """Consecutive tokens. A long row is shown as two segments."""

    start: int = Field(description="Position of the first token in its row, from 0.")
    tokens: list[ShownToken] = Field(description="The tokens in their order.")


class ShownRow(BaseModel):
    """A row as it is trained on."""

    part: str | None = Field(description="For a pair: chosen or rejected.")
    num_tokens: int = Field(description="Number of tokens in training, after truncation.")
    whole_tokens: int = Field(description="Number of tokens before truncation.")
    trained_tokens: int = Field(description="Number of tokens that count in the loss.")
    segments: list[Segment] = Field(description="Parts of the row that are shown: all of it, or its start and its end.")


class SampleRow(BaseModel):
    """A line of the file and the rows made from it."""

    line: int = Field(description="Line of the file, from 1.")
    flaws: list[str] = Field(description="Properties of the row: `too_long`, `empty` or `duplicate`.")
    rows: list[ShownRow] = Field(description="One row; two for a pair.")


class PlannedFile(BaseModel):
    """The data report of a file; see GET /v1/files/{file_id}/report."""

    model_config = ConfigDict(extra="allow")
    rows: int = Field(description="Number of rows in the file. In a file of pairs, a row is a pair.")
    usable_rows: int = Field(
        description="Rows to train on: all except empty and dropped ones. Each piece of a split row counts."
    )
    tokens: int = Field(description="Tokens of the usable rows, after truncation.")
    supervised_tokens: int = Field(description="Tokens that count in the loss.")
    truncated_rows: int = Field(description="Rows of more than max_length tokens that are truncated.")
    dropped_rows: int = Field(description="Rows of more than max_length tokens that are dropped.")
    split_rows: int = Field(description="Rows of more than max_length tokens that are split into pieces.")
    empty_rows: int = Field(description="Rows without a token to train on.")
    duplicate_rows: int = Field(description="Rows that are equal to an earlier one. They are trained on.")
    longest_row: int = Field(description="Tokens of the longest row, before truncation.")
    lines: dict[str, list[int]] | None = Field(
        default=None,
        description="First lines that are too_long, empty or duplicate. Null without the scope files:read.",
    )
    samples: list[SampleRow] | None = Field(
        default=None, description="Sample rows with their tokens. Null without the scope files:read, and in lists."
    )


class Overlap(BaseModel):
    """Rows that the training file and the validation file have in common."""

    rows: int = Field(description="Number of validation rows that are also in the training file.")
    of_rows: int = Field(description="Number of all rows in the validation file.")


class PlannedData(BaseModel):
    """Rows and tokens of the job's files."""

    training: PlannedFile = Field(description="Report of the training file.")
    validation: PlannedFile | None = Field(description="Report of the validation file; null without one.")
    overlap: Overlap | None = Field(description="Null without a validation file.")


class MemoryPart(BaseModel):
    """A part of the memory that a job needs."""

    part: str = Field(description="Stable name of the part, such as `base` or `activations`.")
    bytes: int = Field(description="Size of the part, in bytes.")
    description: str = Field(description="Explanation of the part.")


class PlannedMemory(BaseModel):
    """Memory on one device if the job trains alone. With packmates, theirs is added; the base model is shared."""

    kind: Literal["cuda", "cpu"] = Field(description="Kind of device: a GPU (`cuda`) or a `cpu`.")
    num_devices: int = Field(default=1, description="Size of the device group. Several: a group that currently exists.")
    strategy: Strategy = Field(
        default="replicated",
        description="How the base model is held: replicated on each device, or sharded across the devices, with the "
        "shards in device memory or offloaded to the host's memory.",
    )
    total_bytes: int = Field(description="Memory needed on each device, in bytes.")
    host_bytes: int = Field(default=0, description="Host memory for the offloaded shards of the base model, in bytes.")
    parts: list[MemoryPart] = Field(description="The parts of the total, largest first.")


class GpuSize(BaseModel):
    """A common GPU size."""

    gigabytes: int = Field(description="Advertised memory, in GB.")
    memory_bytes: int = Field(description="Usable memory, in bytes: the least of several models of this size.")
    examples: str = Field(description="Names of GPUs of this size.")


class FittingWorker(BaseModel):
    """A worker whose devices have enough memory for the job."""

    worker_id: str = Field(description="ID of the worker process.")
    name: str = Field(description="Name of its device.")
    kind: str = Field(description="Kind of device: a GPU (`cuda`) or a `cpu`.")
    memory_bytes: int = Field(description="Memory of each of its devices, in bytes.")
    num_devices: int = Field(default=1, description="Number of devices in its group.")
    strategy: Strategy = Field(default="replicated", description="How its trainer would hold the base model.")
    needed_bytes: int | None = Field(default=None, description="Memory needed on each device, in bytes.")


class GpuGroup(GpuSize):
    """Several GPUs of one size that together hold the base model."""

    num_devices: int = Field(description="Number of GPUs in the group.")
    host_bytes: int = Field(default=0, description="Host memory for the offloaded shards of the base model, in bytes.")


class PlannedDevices(BaseModel):
    """Devices with enough memory for the job."""

    smallest_gpu: GpuSize | None = Field(description="Smallest common GPU size that fits; null if none does.")
    groups: list[GpuGroup] = Field(
        default=[], description="Groups of smaller GPUs that fit, with a replicated or sharded base model."
    )
    workers_that_fit: list[FittingWorker] = Field(description="Live workers that fit, smallest first.")
    live_workers: int = Field(description="Number of live workers that accept jobs, whether or not they fit.")


class PlanEstimate(BaseModel):
    """An estimate and its basis. If there is no estimate, `basis` explains why."""

    seconds: float | None = Field(description="The estimate, in seconds; null if there is none.")
    min_seconds: float | None = Field(
        default=None, description="Shortest likely time, in seconds; null: there is no range."
    )
    max_seconds: float | None = Field(
        default=None, description="Longest likely time, in seconds; null: there is no range."
    )
    basis_kind: Literal["measured", "scaled", "guess", "none"] = Field(
        description="`measured`: with this base model. `scaled`: from another base model. `guess`: from the "
        "device's data sheet. `none`: no estimate."
    )
    basis: str = Field(description="Explanation of the estimate's basis.")
    tokens_per_second: float | None = Field(description="Assumed rate, in tokens per second; null without one.")
    worker_id: str | None = Field(description="ID of the worker that the estimate assumes; null without one.")


class PlannedUse(BaseModel):
    """Whether the adapter can be used in one way."""

    verdict: Literal["yes", "with_settings", "no"] = Field(
        description="`yes`, `no`, or `with_settings`: only with the settings that the reasons name."
    )
    reasons: list[str] = Field(description="Explanations of the verdict. Empty if nothing needs attention.")


class PlannedUses(BaseModel):
    """Ways to use the adapter."""

    peft: PlannedUse = Field(description="Loading it with PEFT.")
    vllm: PlannedUse = Field(description="Serving it with vLLM.")
    merge: PlannedUse = Field(description="Merging it into the base model's weights.")


class PlanWarning(BaseModel):
    """A likely problem of the job."""

    code: ErrorCode
    message: ErrorMessage
    remedy: Remedy


class PlanObject(BaseModel):
    """The dry run of a job."""

    model_config = ConfigDict(json_schema_extra=resolved_schema(JobRequest, EXAMPLE))

    id: ObjectId
    object: Literal["plan"] = "plan"
    created_at: CreatedAt
    expires_at: int = Field(description="Time at which the plan is deleted, in Unix seconds.")
    status: Literal["computing", "ready", "failed"] = Field(
        description="`computing`: a worker computes it. `ready`: the results are complete. `failed`: no job can "
        "train on "
        "these files."
    )
    model: str = Field(description="Name of the base model.")
    base_digest: BaseDigest
    training_file: str
    validation_file: str | None
    requested: dict[str, Any] = Field(description="The request as received.")
    configuration: PlanConfiguration = Field(description="The resolved configuration of the job.")
    error: StoredError | None = Field(description="Reason why no job can train on these files.")
    computed_at: int | None = Field(
        description="Time of the results below, in Unix seconds. All are null until the plan is ready."
    )
    data: PlannedData | None = Field(default=None, description="Rows and tokens of the files.")
    num_steps: int | None = Field(default=None, description="Number of optimizer steps.")
    trainable_parameters: int | None = Field(default=None, description="Number of adapter parameters to train.")
    adapted_layers: int | None = Field(default=None, description="Number of linear layers with an adapter.")
    memory: list[PlannedMemory] | None = Field(
        default=None, description="Memory needed on one device, for each kind of device."
    )
    devices: PlannedDevices | None = Field(default=None, description="GPU sizes and workers with enough memory.")
    training_time: PlanEstimate | None = Field(
        default=None, description="Time from the claim to the adapter: load, training and verification."
    )
    expected_start: PlanEstimate | None = Field(default=None, description="Seconds from `computed_at` to the start.")
    servable: PlannedUses | None = Field(default=None, description="Whether the adapter can be used elsewhere.")
    warnings: list[PlanWarning] | None = Field(
        default=None, description="Likely problems of the job. Empty if there are none."
    )


class PlanDeleted(BaseModel):
    """Confirmation that a plan is deleted."""

    id: ObjectId
    object: Literal["plan"] = "plan"
    deleted: Deleted = True


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
