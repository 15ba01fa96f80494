"""Schemas of fine-tuning jobs: the fields of OpenAI's job, then Lorry's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi.openapi.models import Example
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from api.schemas import AdapterName, BaseDigest, CreatedAt, JobId, LineageId
from api.schemas.errors import StoredError
from catalog.spec.data import DataOptions
from catalog.spec.job import JobRequest, JobSpec, PlannedJob
from catalog.spec.lora import LoraSpec
from catalog.spec.methods import Hyperparameters, MethodType, method_object
from catalog.spec.model_fields import Strict, resolved_schema
from catalog.spec.training import EarlyStopping, EvaluationSpec, OptimizerSpec, ScheduleSpec
from catalog.states import JobState, PriorityClass
from catalog.tables.jobs import Job, Trial

JOB_EXAMPLE: dict[str, Any] = {
    "id": "ftjob-1c0ffee0a1b2c3d4e5f60718",
    "object": "fine_tuning.job",
    "created_at": 1790000000,
    "finished_at": None,
    "estimated_finish": 1790000160,
    "status": "running",
    "model": "smollm2-135m",
    "fine_tuned_model": None,
    "organization_id": "org-2d4c6b8a0e1f3a5b7c9d0e2f",
    "result_files": [],
    "seed": 42,
    "trained_tokens": None,
    "training_file": "file-3f2b8c9d0a1e4f5a6b7c8d9e",
    "validation_file": None,
    "hyperparameters": {"batch_size": 4, "learning_rate_multiplier": 1.0, "n_epochs": 3},
    "error": None,
    "integrations": [],
    "metadata": {"team": "search"},
    "tags": ["nightly"],
    "resources": {"devices": 1, "strategy": "single"},
    "priority": "normal",
    "attempt": 1,
    "seconds_running": 41.5,
    "progress": {
        "step": 12,
        "num_steps": 60,
        "epoch": 0.4,
        "loss": 1.83,
        "tokens_per_second": 480.0,
        "seconds_left": 160.0,
        "updated_at": 1790000000.0,
        "valid_loss": 1.91,
        "best_valid_loss": 1.91,
    },
}

JOB_REQUEST_EXAMPLES: dict[str, Example] = {
    "least": {"value": {"model": "smollm2-135m", "training_file": "file-3f2b8c9d0a1e4f5a6b7c8d9e"}},
    "more": {
        "value": {
            "model": "smollm2-135m",
            "training_file": "file-3f2b8c9d0a1e4f5a6b7c8d9e",
            "suffix": "docs",
            "seed": 42,
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
            "lora": {"rank": 32},
        }
    },
    "planned": {"value": {"plan": "plan-5e1f0a9b8c7d6e5f4a3b2c1d"}},
}


def _body_tag(body: Any) -> str:
    return "planned" if isinstance(body, PlannedJob) or (isinstance(body, dict) and "plan" in body) else "job"


JobBody = Annotated[Annotated[JobRequest, Tag("job")] | Annotated[PlannedJob, Tag("planned")], Discriminator(_body_tag)]
"""A body with `plan` creates the job of that plan; any other body contains the fields of the job."""

Phase = Literal["loading", "training", "verifying"]


class ResolvedHyperparameters(BaseModel):
    """OpenAI's hyperparameters, with every `auto` resolved."""

    model_config = ConfigDict(json_schema_extra=resolved_schema(Hyperparameters))
    batch_size: int
    learning_rate_multiplier: float
    n_epochs: int


class MethodObject(BaseModel):
    """The method's type, and under the type's name its hyperparameters with every `auto` resolved."""

    model_config = ConfigDict(extra="allow")
    type: MethodType = Field(description="Training method, which defines the loss and the kind of rows.")


class ResourcesObject(BaseModel):
    """Devices that the job trains on."""

    devices: int = Field(default=1, description="Number of devices: always 1.")
    strategy: Literal["single"] = Field(default="single", description="Distribution across devices: always `single`.")


class Progress(BaseModel):
    """Progress of the job. Times are estimates."""

    model_config = ConfigDict(extra="allow")
    step: int = Field(default=0, description="Number of finished optimizer steps.")
    num_steps: int | None = Field(default=None, description="Number of optimizer steps of the whole job.")
    epoch: float | None = Field(default=None, description="Passes over the training file so far, with a fraction.")
    loss: float | None = Field(default=None, description="Training loss of the latest step.")
    tokens_per_second: float | None = Field(
        default=None, description="Rate of training of this job, in tokens per second."
    )
    seconds_left: float | None = Field(default=None, description="Estimated remaining seconds, as of `updated_at`.")
    updated_at: float | None = Field(
        default=None, description="Time of these values, in Unix seconds, by the database's clock."
    )
    valid_loss: float | None = Field(
        default=None, description="Validation loss of the latest evaluation; null before the first."
    )
    best_valid_loss: float | None = Field(default=None, description="Lowest validation loss so far.")
    kept_step: int | None = Field(
        default=None, description="Optimizer step of the exported weights; null before the end."
    )
    kept_valid_loss: float | None = Field(
        default=None, description="Validation loss of the adapter, at `kept_step`; null before the end."
    )
    stopped_early: str | None = Field(default=None, description="Reason why the job ended before its last step.")


class TrialOf(BaseModel):
    """The sweep and the trial that a job belongs to."""

    id: str = Field(description="ID of the sweep.")
    trial: int = Field(description="Number of the trial, from 0.")
    parameters: dict[str, Any] = Field(description="Values of the varied job fields, by dotted path.")


class ReproductionDigests(BaseModel):
    """Digests that equal bits have. Null: the lineage record does not contain the digest."""

    weights: str | None = Field(description="SHA-256 of `adapter_model.safetensors`.")
    loss_log: str | None = Field(description="SHA-256 of all points of both loss curves.")


class ReproductionDifference(BaseModel):
    """A condition on which the bits of an adapter depend, and that differs between the two trainings."""

    field: str = Field(description="The condition, such as `processor` or `version of torch`.")
    recorded: Any = Field(description="Value in the adapter's lineage record.")
    reproduced: Any = Field(description="Value in the new training.")


class ReproductionMachine(BaseModel):
    """A machine that computed steps of an adapter. Null: the lineage record does not contain the condition."""

    attempt: int | None = Field(description="Number of the job's attempt.")
    worker: str | None = Field(description="ID of the worker.")
    from_step: int = Field(description="The step from which this attempt continued.")
    device: str | None = Field(default=None, description="Kind of device.")
    processor: str | None = Field(default=None, description="Name of the processor.")
    dtype: str | None = Field(default=None, description="Precision of the base model.")
    quantization: str | None = Field(default=None, description="Quantization of the base model.")
    num_processes: int | None = Field(default=None, description="Number of trainer processes.")
    strategy: str | None = Field(default=None, description="How the devices hold the base model.")


class ReproductionMachines(BaseModel):
    """The machines of the two trainings. A job that was resumed may have several."""

    recorded: list[ReproductionMachine] = Field(description="Machines of the adapter's training.")
    reproduced: list[ReproductionMachine] = Field(description="Machines of the new training.")


class ReproductionObject(BaseModel):
    """The adapter that a job trains again from its lineage record, and the comparison of the two.

    The fields after `expected` are null until the job has succeeded.
    """

    adapter: str = Field(description="ID of the adapter.")
    name: AdapterName
    lineage_id: LineageId
    expected: ReproductionDigests = Field(description="The recorded digests.")
    reproduced: ReproductionDigests | None = Field(default=None, description="The digests of the job's own adapter.")
    identical: bool | None = Field(default=None, description="Whether the digests are equal.")
    differences: list[ReproductionDifference] | None = Field(
        default=None, description="Conditions that differ between the two trainings."
    )
    machines: ReproductionMachines | None = Field(default=None, description="Machines of the two trainings.")
    is_difference_expected: bool | None = Field(
        default=None,
        description="Whether the adapter differs, and equal bits were not promised: a condition differs, or a "
        "determinism level is not `bitwise`.",
    )
    message: str | None = Field(default=None, description="The verdict in sentences.")


class JobMove(Strict):
    """New position among the project's waiting jobs of the same priority. Exactly one field must be set."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"to": "first"},
            "oneOf": [
                {"required": [name], "properties": {name: {"type": "string"}}} for name in ("before", "after", "to")
            ],
        }
    )
    before: str | None = Field(
        default=None, max_length=64, description="ID of the job to move before. Null: use another field."
    )
    after: str | None = Field(
        default=None, max_length=64, description="ID of the job to move behind. Null: use another field."
    )
    to: Literal["first", "last"] | None = Field(
        default=None, description="The first or the last position. Null: use another field."
    )


class FineTuningJob(BaseModel):
    """A fine-tuning job: OpenAI's fields, then Lorry's."""

    model_config = ConfigDict(json_schema_extra=resolved_schema(JobRequest, JOB_EXAMPLE))

    id: JobId
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: CreatedAt
    started_at: int | None = Field(description="First start of training, in Unix seconds; null before.")
    finished_at: int | None = Field(
        description="Time at which the job reached a final status, in Unix seconds; null before."
    )
    estimated_finish: int | None = Field(
        description="Estimated end, in Unix seconds; null unless the job is running and has an estimate."
    )
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"] = Field(
        description="Status of the job; see the page on job states."
    )
    phase: Phase | None = Field(
        description="Phase of a running job. `loading`: no trainer has received it yet. `verifying`: all steps are "
        "done, or the job stopped early, and PEFT verifies the adapter. Null in other states."
    )
    reason: str | None = Field(description="Reason why the last attempt ended.")
    model: str = Field(description="Name of the base model.")
    base_digest: BaseDigest
    sweep: TrialOf | None = Field(description="The sweep and trial; null if the job is not a trial.")
    parent_adapter: str | None = Field(description="Name of the adapter from which the job continues.")
    reproduces: ReproductionObject | None = Field(
        description="The adapter that the job trains again; null if it was not created by `reproduce`."
    )
    fine_tuned_model: str | None = Field(description="Name of the trained adapter; null until the job has succeeded.")
    adapter_id: str | None = Field(description="ID of the trained adapter; null until the job has succeeded.")
    organization_id: str = Field(description="Organization of the project.")
    result_files: list[str] = Field(
        description="ID of a CSV file with the curves of a job that has succeeded. The file may have been deleted."
    )
    seed: int = Field(description="Seed of everything random in the job, given or drawn.")
    trained_tokens: int | None = Field(
        description="Number of tokens in all training steps; null until the job has succeeded."
    )
    training_file: str
    validation_file: str | None
    hyperparameters: ResolvedHyperparameters = Field(description="OpenAI's three hyperparameters, resolved.")
    method: MethodObject = Field(description="The training method and its hyperparameters, resolved.")
    suffix: str | None
    error: StoredError | None = Field(description="Reason of a failure; null unless the job has failed.")
    integrations: list[dict[str, Any]] = Field(description="Trackers to which the job's metrics are written.")
    metadata: dict[str, str] | None
    tags: list[str]
    resources: ResourcesObject = Field(default=ResourcesObject(), description="Devices of the job.")
    lora: LoraSpec = Field(description="The adapter configuration, resolved.")
    optimizer: OptimizerSpec = Field(description="The optimizer, resolved.")
    schedule: ScheduleSpec = Field(description="The learning rate schedule.")
    evaluation: EvaluationSpec = Field(description="The evaluations on the validation file.")
    data: DataOptions = Field(description="How the rows of the files are used.")
    early_stopping: EarlyStopping | None = Field(
        description="Conditions under which the job stops early; null: it trains all steps."
    )
    precision: str = Field(description="Precision of the base model: `bfloat16` or `float32`.")
    quantization: Literal["none", "nf4", "int8"] = Field(description="Quantization of the base model's linear layers.")
    max_length: int = Field(description="Maximum number of tokens of a row.")
    max_steps: int | None
    checkpoint_every_steps: int
    requested: dict[str, Any] = Field(description="The request as received. Omitted fields are absent.")
    priority: Literal["urgent", "normal", "batch"]
    deadline: int | None = Field(
        description="Time by which the job should finish, in Unix seconds. If it can't, an event reports it and "
        "the job continues."
    )
    is_held: bool = Field(description="Whether the job stays in the queue and does not start until it is released.")
    seconds_running: float = Field(
        description="Time under a worker's claim, in seconds, over all attempts. Waiting and pauses do not count."
    )
    num_steps: int | None = Field(description="Number of optimizer steps; null until the files are prepared.")
    progress: Progress | None = Field(description="Progress of training; null until it starts.")
    attempt: int = Field(description="Number of the current or last attempt; 0 before the first.")
    trainer_id: str | None = Field(description="ID of the trainer process that has the job; null unless it is running.")
    worker_id: str | None = Field(description="ID of the worker that has the job; null if none has it.")
    run_after: int | None = Field(
        description="Time before which a retry does not start, in Unix seconds; null without a retry."
    )
    cancel_requested: bool = Field(
        description="Whether a cancellation is requested. A running job stops at its next step."
    )
    pause_requested: bool = Field(description="Whether a pause is requested. A running job first saves a checkpoint.")


def job_object(
    row: Job, *, organization_id: str, adapter_id: str | None, seconds_running: float, trial: Trial | None = None
) -> FineTuningJob:
    spec = JobSpec.model_validate(row.spec)
    return FineTuningJob.model_validate(
        {
            **_identity(row),
            **_run(row),
            "organization_id": organization_id,
            "adapter_id": adapter_id,
            "sweep": trial and TrialOf(id=trial.sweep_id, trial=trial.number, parameters=trial.parameters),
            "seconds_running": seconds_running,
            **configuration(spec),
        }
    )


def configuration(spec: JobSpec) -> dict[str, Any]:
    """Return the resolved configuration of a job as response fields."""
    shared = ResolvedHyperparameters(
        batch_size=spec.batch_size, learning_rate_multiplier=spec.learning_rate_multiplier, n_epochs=spec.n_epochs
    )
    return {
        "parent_adapter": spec.parent.name if spec.parent else None,
        "seed": spec.seed,
        "hyperparameters": shared,
        "method": method_object(spec.method, shared.model_dump(), spec.method_options),
        "lora": spec.lora,
        "optimizer": spec.optimizer,
        "schedule": spec.schedule,
        "data": spec.data,
        "evaluation": spec.evaluation,
        "early_stopping": spec.early_stopping,
        "precision": spec.precision,
        "quantization": spec.quantization,
        "max_length": spec.max_length,
        "max_steps": spec.max_steps,
        "checkpoint_every_steps": spec.checkpoint_every_steps,
    }


def _identity(row: Job) -> dict[str, Any]:
    """Return the fields of the submission."""
    return {
        "id": row.id,
        "created_at": int(row.created_at),
        "model": row.base_model,
        "base_digest": row.base_digest,
        "training_file": row.training_file,
        "validation_file": row.validation_file,
        "suffix": row.suffix,
        "metadata": row.labels,
        "tags": row.tags or [],
        "requested": row.requested,
        "integrations": row.requested.get("integrations") or [],
        "priority": PriorityClass(row.priority).name,
        "deadline": _seconds(row.deadline),
        "reproduces": row.reproduces and {**row.reproduces, **(row.reproduction or {})},
    }


def _run(row: Job) -> dict[str, Any]:
    """Return the fields that change while the job is processed."""
    return {
        "status": row.state,
        "phase": phase_of(row),
        "reason": row.reason,
        "started_at": _seconds(row.started_at),
        "finished_at": _seconds(row.finished_at),
        "estimated_finish": _estimated_finish(row),
        "fine_tuned_model": row.adapter_name,
        "result_files": [row.result_file] if row.result_file else [],
        "trained_tokens": row.trained_tokens,
        "error": row.error,
        "num_steps": row.num_steps,
        "progress": row.progress,
        "attempt": row.attempt,
        "trainer_id": row.trainer_id,
        "worker_id": row.worker_id,
        "run_after": _seconds(row.run_after),
        "cancel_requested": row.cancel_requested,
        "pause_requested": row.pause_requested,
        "is_held": row.is_held,
    }


def _estimated_finish(row: Job) -> int | None:
    """Return the estimate made when the progress was updated, so that it is stable until the next update."""
    progress = row.progress or {}
    if row.state != "running" or progress.get("seconds_left") is None:
        return None
    return int(progress["updated_at"] + progress["seconds_left"])


def phase_of(row: Job) -> Phase | None:
    if row.state != JobState.RUNNING:
        return None
    if row.started_at is None:
        return "loading"
    progress = row.progress or {}
    is_trained = row.num_steps and progress.get("step", 0) >= row.num_steps
    return "verifying" if is_trained or progress.get("stopped_early") else "training"


def _seconds(value: float | None) -> int | None:
    return None if value is None else int(value)
