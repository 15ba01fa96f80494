"""Schemas of a job's events, log lines, checkpoints, metrics, attempts and explanation."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas import CreatedAt, JobId, ObjectId
from catalog.history.job_logs import Line
from catalog.history.metric_points import Point
from catalog.resources.sharding import Strategy
from catalog.tables.history import Attempt, Checkpoint, JobEvent

EVENT_PREFIX = "ftevent-"


class FineTuningJobEvent(BaseModel):
    """A message about a job: a change of its state, a warning, or metrics."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "ftevent-417",
                "object": "fine_tuning.job.event",
                "created_at": 1790000003,
                "level": "info",
                "message": "Files validated: 410 rows, 27114 tokens.",
                "type": "message",
                "data": None,
            }
        }
    )
    id: str = Field(description="ID of the event; later events have greater numbers.")
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: CreatedAt
    level: Literal["info", "warn", "error"] = Field(
        description="Importance of the event: information, warning or error."
    )
    message: str = Field(description="Sentence for users.")
    type: Literal["message", "metrics"] = Field(
        description="`metrics`: `data` has the metrics of a step. `message`: any other event."
    )
    data: dict[str, Any] | None = Field(description="Facts of the event for programs; null if it has none.")


class Rewards(BaseModel):
    """Rewards of a preference job: means over the pairs, or the labeled answers, of a step or of the validation file.

    The method defines the reward. For dpo and kto it is beta times the log ratio of the answer's probabilities under
    the adapter and under the reference. For kto, `chosen` covers answers with the label true and `rejected` those with
    the label false; a value is null if a step has no such answers.
    """

    chosen: float | None = Field(default=None, description="Mean reward of the preferred answers.")
    rejected: float | None = Field(default=None, description="Mean reward of the other answers.")
    margin: float | None = Field(default=None, description="`chosen` minus `rejected`.")
    accuracy: float = Field(
        description="Fraction of pairs whose preferred answer has the higher reward. For kto: fraction of answers "
        "whose reward is above beta times `kl` if the label is true, or below it if the label is false."
    )
    kl: float | None = Field(
        default=None,
        description="For kto: divergence of the adapter from the reference in nats, the baseline of rewards.",
    )


class CheckpointMetrics(BaseModel):
    """Metrics at the step of the checkpoint; null if not measured."""

    step: float | None = Field(default=None, description="Number of optimizer steps before the checkpoint.")
    train_loss: float | None = Field(default=None, description="Training loss of the step.")
    train_mean_token_accuracy: float | None = Field(
        default=None, description="Fraction of the step's trained tokens that were predicted correctly."
    )
    valid_loss: float | None = Field(
        default=None, description="Always null: every evaluation covers the whole validation file."
    )
    valid_mean_token_accuracy: float | None = Field(
        default=None, description="Always null, as fractions are reported for the whole validation file."
    )
    full_valid_loss: float | None = Field(default=None, description="Loss on the whole validation file.")
    full_valid_mean_token_accuracy: float | None = Field(
        default=None, description="Fraction of the validation file's trained tokens that were predicted correctly."
    )
    train_rewards: Rewards | None = Field(default=None, description="Rewards of the step's pairs or labeled answers.")
    full_valid_rewards: Rewards | None = Field(default=None, description="Rewards on the whole validation file.")


class FineTuningJobCheckpoint(BaseModel):
    """The state of a job after a step. A job resumes from its newest checkpoint."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "ftckpt-0a1b2c3d4e5f60718293a4b5",
                "object": "fine_tuning.job.checkpoint",
                "created_at": 1790000090,
                "fine_tuned_model_checkpoint": "ft:smollm2-135m:default:docs:1c0ffee0:ckpt-step-50",
                "fine_tuning_job_id": "ftjob-1c0ffee0a1b2c3d4e5f60718",
                "step_number": 50,
                "metrics": {"step": 50, "train_loss": 1.71},
                "available": True,
            }
        }
    )
    id: ObjectId
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: CreatedAt
    fine_tuned_model_checkpoint: str = Field(description="Name of the checkpoint's adapter, to use as a model.")
    fine_tuning_job_id: str = Field(description="ID of the job that saved it.")
    step_number: int = Field(description="Number of optimizer steps before the checkpoint.")
    metrics: CheckpointMetrics = Field(description="Metrics measured at the checkpoint's step.")
    available: bool = Field(
        description="Whether it can be used as a model: the newest two of a job, until seven days after the job's end."
    )


class LogLine(BaseModel):
    """A line that a trainer printed while it held the job. Secrets and names of other projects' jobs are removed."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"id": "1-0-7", "attempt": 1, "rank": 0, "number": 7, "text": "Loading…"}}
    )
    id: str = Field(description="ID of the line: attempt, rank and number.")
    object: Literal["fine_tuning.job.log_line"] = "fine_tuning.job.log_line"
    attempt: int = Field(description="Number of the job's attempt, from 1.")
    rank: int = Field(description="Rank of the trainer process; 0 if there is only one.")
    number: int = Field(description="Line number in the stored log of that process, from 1.")
    text: str = Field(description="The line as the trainer printed it, without its line break.")


def log_line(line: Line) -> LogLine:
    return LogLine(id=line.id, attempt=line.attempt, rank=line.rank, number=line.number, text=line.text)


class MetricPoint(BaseModel):
    """One point of a curve. If a step is trained again after a resume, its new point replaces the old one."""

    model_config = ConfigDict(json_schema_extra={"example": {"kind": "train", "step": 12, "loss": 1.83}})
    object: Literal["fine_tuning.job.metric"] = "fine_tuning.job.metric"
    kind: Literal["train", "valid"] = Field(
        description="`train`: measured in training. `valid`: measured on the validation file."
    )
    step: int = Field(description="Number of optimizer steps before the measurement.")
    created_at: int = Field(description="Time of the measurement, in Unix seconds.")
    loss: float | None = Field(
        description="Mean over trained tokens, or over pairs or labeled answers; null if the loss was not finite."
    )
    token_accuracy: float | None = Field(description="Fraction of the trained tokens that were predicted correctly.")
    learning_rate: float | None = Field(description="Learning rate of the step; null for evaluations.")
    grad_norm: float | None = Field(description="Norm of the gradient before clipping; null for evaluations.")
    num_tokens: int | None = Field(description="Number of tokens processed for the point; null if not recorded.")
    rewards: Rewards | None = Field(description="Rewards of a preference job; null for the method supervised.")


class AttemptObject(BaseModel):
    """An attempt: one claim of the job by a worker."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"number": 1, "worker_id": "host-1", "trainer_id": "trainer-9", "packmates": ["ftjob-2"]}
        }
    )
    object: Literal["fine_tuning.job.attempt"] = "fine_tuning.job.attempt"
    number: int = Field(description="Number of the attempt, from 1.")
    claim_id: str = Field(description="ID of the worker's claim of the job.")
    worker_id: str = Field(description="ID of the worker that claimed the job.")
    trainer_id: str = Field(description="ID of the trainer process that the worker chose.")
    started_at: int = Field(description="Time of the claim, in Unix seconds.")
    ended_at: int | None = Field(description="End of the attempt, in Unix seconds; null while it runs.")
    reason: str | None = Field(description="Reason of the end, such as `completed` or `cuda_oom`; null while it runs.")
    detail: str | None = Field(description="Explanation of the reason; null if there is none.")
    resumed_from_step: int | None = Field(
        description="Optimizer step from which the attempt continued; null if it started from the beginning."
    )
    packmates: list[str] = Field(description="Jobs that trained in the same trainer during the attempt.")
    why: dict[str, Any] = Field(description="Inputs of the scheduling decision.")


class DividedBlocks(BaseModel):
    """The blocks of a sharded base model. Embeddings, head and final norm are in no block: every device holds them."""

    count: int | None = Field(description="Number of blocks; null if unknown.")
    bytes: int = Field(description="Total size of all blocks, in bytes.")
    share_bytes: int = Field(
        description="Size of the shard that each device holds, or that the host holds for it, in bytes."
    )
    gathered_bytes: int = Field(
        description="Size of the full blocks that a device holds at one time, in addition to its shard, in bytes."
    )


class Placement(BaseModel):
    """A device group on which the job trains or could train, and how the base model is held there."""

    kind: str = Field(description="`cuda` or `cpu`.")
    num_devices: int = Field(description="Number of trainer processes: one on each GPU.")
    num_workers: int = Field(description="Number of workers with such a device group.")
    strategy: Strategy = Field(
        description="How the base model is held: replicated on each device, or sharded across the devices, with the "
        "shards in device memory or offloaded to the host's memory."
    )
    reason: str = Field(description="Explanation of the strategy.")
    needed_bytes: int = Field(description="Memory needed on each device if the job trains alone, in bytes.")
    memory_bytes: int = Field(description="Memory of the smallest device of the group, in bytes.")
    blocks: DividedBlocks | None = Field(description="Null if the base model is replicated.")


class WhyObject(BaseModel):
    """Explanation of the job's state."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "example": {
                "object": "fine_tuning.job.why",
                "job_id": "ftjob-1c0ffee0a1b2c3d4e5f60718",
                "state": "queued",
                "explanation": "It is next: a worker takes it as soon as it has room.",
            }
        },
    )
    state: str = Field(description="Status of the job.")
    explanation: str = Field(description="One sentence for users.")
    object: Literal["fine_tuning.job.why"] = "fine_tuning.job.why"
    job_id: JobId
    placements: list[Placement] | None = Field(
        default=None,
        description="For a running job, where it trains. For a queued job, the device groups of live workers that can "
        "hold it. Null in other states.",
    )


class JobDataReport(BaseModel):
    """Data reports of the job's files; null for a file that does not exist or is not prepared yet."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "object": "fine_tuning.job.data_report",
                "job_id": "ftjob-1c0ffee0a1b2c3d4e5f60718",
                "training": {"rows": 410, "tokens": 27114, "supervised_tokens": 5320, "truncated_rows": 2},
                "validation": None,
            }
        }
    )

    object: Literal["fine_tuning.job.data_report"] = "fine_tuning.job.data_report"
    job_id: JobId
    training: dict[str, Any] | None = Field(description="Rows and tokens of the training file.")
    validation: dict[str, Any] | None = Field(description="Rows and tokens of the validation file.")


def event_object(row: JobEvent) -> FineTuningJobEvent:
    return FineTuningJobEvent.model_validate(
        {
            "id": f"{EVENT_PREFIX}{row.seq}",
            "created_at": int(row.created_at),
            "level": row.level,
            "message": row.message,
            "type": "metrics" if row.type == "metrics" else "message",
            "data": row.data,
        }
    )


def checkpoint_object(row: Checkpoint, *, train: Point | None, valid: Point | None) -> FineTuningJobCheckpoint:
    """Return a checkpoint's response. `train` and `valid` are the points of the curves at its step."""
    return FineTuningJobCheckpoint(
        id=row.id,
        created_at=int(row.created_at),
        fine_tuned_model_checkpoint=row.name,
        fine_tuning_job_id=row.job_id,
        step_number=row.step,
        metrics=CheckpointMetrics.model_validate(
            {"step": row.step, **_measured("train", train), **_measured("full_valid", valid)}
        ),
        available=row.adapter is not None,
    )


def _measured(name: str, point: Point | None) -> dict[str, Any]:
    if point is None:
        return {}
    accuracy = point.token_accuracy
    return {f"{name}_loss": point.loss, f"{name}_mean_token_accuracy": accuracy, f"{name}_rewards": point.rewards}


def metric_point(row: Point) -> MetricPoint:
    return MetricPoint.model_validate(
        {
            "kind": row.kind,
            "step": row.step,
            "created_at": int(row.created_at),
            "loss": row.loss if math.isfinite(row.loss) else None,
            "token_accuracy": row.token_accuracy,
            "learning_rate": row.learning_rate,
            "grad_norm": row.grad_norm,
            "num_tokens": row.num_tokens,
            "rewards": row.rewards,
        }
    )


def attempt_object(row: Attempt, *, packmates: list[str]) -> AttemptObject:
    return AttemptObject(
        number=row.number,
        claim_id=row.claim_id,
        worker_id=row.worker_id,
        trainer_id=row.trainer_id,
        started_at=int(row.started_at),
        ended_at=None if row.ended_at is None else int(row.ended_at),
        reason=row.reason,
        detail=row.detail,
        resumed_from_step=row.resumed_from_step,
        packmates=packmates,
        why=row.why,
    )
