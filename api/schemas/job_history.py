"""What a job leaves behind: events, checkpoints, points of its curves, attempts, and why it waits."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from catalog.history.job_logs import Line
from catalog.history.metric_points import Point
from catalog.resources.sharding import Strategy
from catalog.tables.history import Attempt, Checkpoint, JobEvent

EVENT_PREFIX = "ftevent-"


class FineTuningJobEvent(BaseModel):
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
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class Rewards(BaseModel):
    """Of a job that compares answers: means over the pairs, or the labeled answers, of a step or of the held-out set.

    What a reward is, the method says: of dpo and kto, beta times the log of how much likelier the adapter makes an
    answer. Of kto, `chosen` is of answers with the label true and `rejected` of the others; null where a step has none.
    """

    chosen: float | None = None
    rejected: float | None = None
    margin: float | None = Field(default=None, description="chosen - rejected.")
    accuracy: float = Field(
        description="Part of the pairs whose preferred answer has the greater reward; of kto, of the answers whose "
        "reward is above beta times kl where the label is true, and below it where it is false."
    )
    kl: float | None = Field(
        default=None, description="Of kto: how far the adapter is from its base, in nats, which rewards are held to."
    )


class CheckpointMetrics(BaseModel):
    """As they were at the step; what was not measured is null."""

    step: float | None = None
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None
    train_rewards: Rewards | None = None
    full_valid_rewards: Rewards | None = None


class FineTuningJobCheckpoint(BaseModel):
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
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics
    available: bool = Field(
        description="It can be used as a model: the newest two of a job can, until seven days after its end."
    )


class LogLine(BaseModel):
    """A line that a trainer printed while it held the job. Secrets and names of others' jobs are taken out."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"id": "1-0-7", "attempt": 1, "rank": 0, "number": 7, "text": "Loading…"}}
    )
    id: str
    object: Literal["fine_tuning.job.log_line"] = "fine_tuning.job.log_line"
    attempt: int
    rank: int = Field(description="Which of the trainer's processes; 0 where there is one.")
    number: int = Field(description="In what is kept of that process, from 1.")
    text: str


def log_line(line: Line) -> LogLine:
    return LogLine(id=line.id, attempt=line.attempt, rank=line.rank, number=line.number, text=line.text)


class MetricPoint(BaseModel):
    """One point of a curve. A step that is trained again after a resume replaces its point."""

    model_config = ConfigDict(json_schema_extra={"example": {"kind": "train", "step": 12, "loss": 1.83}})
    object: Literal["fine_tuning.job.metric"] = "fine_tuning.job.metric"
    kind: Literal["train", "valid"]
    step: int
    created_at: int
    loss: float | None = Field(
        description="Mean over supervised tokens, or over what is compared; null where it was not finite."
    )
    token_accuracy: float | None
    learning_rate: float | None
    grad_norm: float | None
    num_tokens: int | None
    rewards: Rewards | None


class AttemptObject(BaseModel):
    """One claim of the job by one worker."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"number": 1, "worker_id": "host-1", "trainer_id": "trainer-9", "packmates": ["ftjob-2"]}
        }
    )
    object: Literal["fine_tuning.job.attempt"] = "fine_tuning.job.attempt"
    number: int
    claim_id: str
    worker_id: str
    trainer_id: str | None
    started_at: int
    ended_at: int | None
    reason: str | None
    detail: str | None
    resumed_from_step: int | None
    packmates: list[str] = Field(description="Jobs that trained in the same trainer at some time.")
    why: dict[str, Any] | None = Field(description="What the decision to run it was made from.")


class DividedBlocks(BaseModel):
    """Of a divided base. Embeddings, head and last norm are in no block: each device holds them."""

    count: int | None
    bytes: int = Field(description="Of all blocks.")
    share_bytes: int = Field(description="That each device holds all the time, or its host for it.")
    gathered_bytes: int = Field(description="Of blocks that a device holds whole at one time, beside its share.")


class Placement(BaseModel):
    """A device group that the job trains on, or could, and how each of its devices holds the base."""

    kind: str = Field(description="cuda or cpu.")
    num_devices: int = Field(description="Processes of its trainer: one on each GPU.")
    num_workers: int = Field(description="Workers with such a group.")
    strategy: Strategy = Field(
        description="Each device holds the whole base, or of each block its share, there or in the host's memory."
    )
    reason: str = Field(description="Why it is held so.")
    needed_bytes: int = Field(description="On each device, with a trainer to itself.")
    memory_bytes: int = Field(description="Of each device, the smallest of them.")
    blocks: DividedBlocks | None = Field(description="Null where each device holds the whole base.")


class WhyObject(BaseModel):
    """Why the job is where it is, and what it waits for."""

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
    state: str
    explanation: str = Field(description="One sentence for a person.")
    object: Literal["fine_tuning.job.why"] = "fine_tuning.job.why"
    job_id: str
    placements: list[Placement] | None = Field(
        default=None,
        description="Of a running job where it trains; of a queued one the groups of workers that run and hold it. "
        "Null in other states.",
    )


class JobDataReport(BaseModel):
    """What preparation found in the job's files; null for a file that is not there or not prepared yet."""

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
    job_id: str
    training: dict[str, Any] | None
    validation: dict[str, Any] | None


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


def checkpoint_object(
    row: Checkpoint, *, name: str, train: Point | None, valid: Point | None
) -> FineTuningJobCheckpoint:
    """`train`, `valid`: the points of the curves at its step."""
    return FineTuningJobCheckpoint(
        id=row.id,
        created_at=int(row.created_at),
        fine_tuned_model_checkpoint=name,
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
