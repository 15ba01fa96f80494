"""What the service answers, as dataclasses. Unknown fields are kept in `raw`; missing ones have a default.

So an older client reads a newer service, and the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, cast

FINAL_STATUSES = frozenset({"succeeded", "failed", "cancelled"})


@dataclass(frozen=True, kw_only=True)
class View:
    """A JSON object of the wire. A field whose metadata names a `view` is itself such an object."""

    raw: dict[str, Any] = field(default_factory=dict[str, Any], repr=False, compare=False)

    @classmethod
    def of(cls, wire: Mapping[str, Any]) -> Self:
        values: dict[str, Any] = {}
        for known in fields(cls):
            value = wire.get(known.name)
            if known.name == "raw" or value is None:
                continue
            view: type[View] | None = known.metadata.get("view")
            if view is None:
                values[known.name] = value
            elif isinstance(value, Mapping):
                values[known.name] = view.of(cast("Mapping[str, Any]", value))
        return cls(**values, raw=dict(wire))


@dataclass(frozen=True, kw_only=True)
class File(View):
    """An uploaded file. `bytes` is its size; `kind` what the rows of a data set are: chat, completion, text,
    preference or unpaired."""

    id: str = ""
    filename: str = ""
    purpose: str = ""
    bytes: int = 0
    rows: int | None = None
    kind: str | None = None
    same_content_as: str | None = None
    """After an upload: an earlier file with the same bytes."""
    digest: str = ""
    """sha256 of the content."""
    expires_at: int | None = None
    """From then on it is gone, once no unfinished job reads it."""
    status: str = ""
    created_at: int = 0


@dataclass(frozen=True, kw_only=True)
class Progress(View):
    """How far a job is. `seconds_left` is an estimate; `valid_loss` is the latest on held-out data."""

    step: int = 0
    num_steps: int = 0
    epoch: float | None = None
    loss: float | None = None
    valid_loss: float | None = None
    best_valid_loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    kept_step: int | None = None
    """Whose weights the adapter has; None before the end."""
    kept_valid_loss: float | None = None
    """On held-out data at that step: the adapter's own loss."""
    stopped_early: str | None = None
    """Why the job ended before its last step."""


@dataclass(frozen=True, kw_only=True)
class JobFailure(View):
    """Why a job failed. `param` is the field or file at fault."""

    code: str = ""
    message: str = ""
    remedy: str = ""
    param: str | None = None


@dataclass(frozen=True, kw_only=True)
class Job(View):
    """A fine-tuning job; what it asked for is resolved to numbers."""

    id: str = ""
    status: str = ""
    phase: str | None = None
    """Of a running job: loading, training or verifying."""
    model: str = ""
    parent_adapter: str | None = None
    """Name of the adapter that it continues."""
    training_file: str = ""
    validation_file: str | None = None
    fine_tuned_model: str | None = None
    adapter_id: str | None = None
    result_files: list[str] = field(default_factory=list[str])
    """Ids of files: the curves of a job that has succeeded, as CSV with OpenAI's columns."""
    suffix: str | None = None
    created_at: int = 0
    started_at: int | None = None
    finished_at: int | None = None
    seconds_running: float | None = None
    """In the hands of workers, over all attempts: without waiting and pauses."""
    trained_tokens: int | None = None
    seed: int | None = None
    priority: str | None = None
    deadline: int | None = None
    """Seconds since 1970. A job that can't meet it is told so, and goes on."""
    is_held: bool = False
    """It waits, and isn't chosen before it is released."""
    attempt: int = 0
    trainer_id: str | None = None
    worker_id: str | None = None
    pause_requested: bool = False
    cancel_requested: bool = False
    max_length: int | None = None
    max_steps: int | None = None
    precision: str | None = None
    quantization: str | None = None
    checkpoint_every_steps: int | None = None
    evaluation: dict[str, Any] = field(default_factory=dict[str, Any])
    data: dict[str, Any] = field(default_factory=dict[str, Any])
    early_stopping: dict[str, Any] | None = None
    lora: dict[str, Any] = field(default_factory=dict[str, Any])
    optimizer: dict[str, Any] = field(default_factory=dict[str, Any])
    schedule: dict[str, Any] = field(default_factory=dict[str, Any])
    method: dict[str, Any] = field(default_factory=dict[str, Any])
    hyperparameters: dict[str, Any] = field(default_factory=dict[str, Any])
    metadata: dict[str, str] | None = None
    sweep: dict[str, Any] | None = None
    """Of a trial: id of its sweep, trial, parameters."""
    integrations: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    tags: list[str] = field(default_factory=list[str])
    progress: Progress = field(default_factory=Progress, metadata={"view": Progress})
    error: JobFailure | None = field(default=None, metadata={"view": JobFailure})

    @property
    def is_final(self) -> bool:
        return self.status in FINAL_STATUSES


@dataclass(frozen=True, kw_only=True)
class JobEvent(View):
    """A line of a job's log."""

    id: str = ""
    created_at: int = 0
    level: Literal["info", "warn", "error"] = "info"
    message: str = ""
    type: str = "message"
    data: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class LogLine(View):
    """What a trainer printed while it held the job. `rank`: which of the trainer's processes."""

    id: str = ""
    attempt: int = 0
    rank: int = 0
    number: int = 0
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Sample(View):
    """A job's answer to one of its own prompts. `is_complete`: it came to its end within the tokens allowed."""

    step: int = 0
    prompt: str = ""
    answer: str = ""
    num_tokens: int = 0
    is_complete: bool = False


@dataclass(frozen=True, kw_only=True)
class Checkpoint(View):
    """A point that a job can go on from."""

    id: str = ""
    created_at: int = 0
    fine_tuning_job_id: str = ""
    fine_tuned_model_checkpoint: str = ""
    step_number: int = 0
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])
    available: bool = False
    """It can be used as a model, by its fine_tuned_model_checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Permission(View):
    """A project may read an adapter, or a checkpoint, of another."""

    id: str = ""
    created_at: int = 0
    project_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Attempt(View):
    """One run of a job by one worker, and which jobs shared its trainer."""

    number: int = 0
    claim_id: str = ""
    worker_id: str = ""
    trainer_id: str | None = None
    started_at: int | None = None
    ended_at: int | None = None
    reason: str | None = None
    detail: str | None = None
    resumed_from_step: int | None = None
    packmates: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, kw_only=True)
class JobUpdate(View):
    """One message of a job's live stream; exactly one of the three last is set, by `kind`."""

    kind: str = ""
    id: str = ""
    job: Job | None = None
    event: JobEvent | None = None
    metric: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Model(View):
    """A base model or an adapter, as a name to train on or to talk to."""

    id: str = ""
    created: int = 0
    owned_by: str = ""
    kind: str = ""
    state: str = ""
    base: str | None = None
    digest: str | None = None
    source: str | None = None
    revision: str | None = None
    local_path: str | None = None
    description: dict[str, Any] | None = None
    error: JobFailure | None = field(default=None, metadata={"view": JobFailure})


@dataclass(frozen=True, kw_only=True)
class Verification(View):
    """How far PEFT's logits were from training's when the adapter was exported."""

    passed: bool | None = None
    max_abs_diff: float | None = None
    tolerance: float | None = None
    worst_linear: str | None = None
    worst_linear_error: float | None = None
    explanation: str | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation(View):
    """Mean loss per supervised token of the held-out file, with the adapter and for what its job began with: the base,
    or the parent adapter."""

    base_loss: float | None = None
    parent_loss: float | None = None
    loss: float | None = None
    base_perplexity: float | None = None
    parent_perplexity: float | None = None
    perplexity: float | None = None
    rewards: dict[str, float | None] | None = None
    """Of a job that compared answers, which has no perplexity: chosen, rejected, margin, accuracy, and kl of kto."""


@dataclass(frozen=True, kw_only=True)
class Adapter(View):
    """A trained adapter. `artifact` is the digest of its manifest."""

    id: str = ""
    name: str = ""
    created_at: int = 0
    job_id: str = ""
    owned_by: str = ""
    """The project that trained it; another than yours where it is shared with you."""
    checkpoint_step: int | None = None
    """Of a checkpoint, which is read like an adapter."""
    base_model: str = ""
    base_digest: str = ""
    parent: str | None = None
    """Name of the adapter that it continues."""
    artifact: str = ""
    bytes: int = 0
    num_parameters: int = 0
    rank: int | None = None
    precision: str | None = None
    """Of the base in training and verification, like `quantization`: what it is best served on."""
    quantization: str | None = None
    lineage_id: str = ""
    verification: Verification = field(default_factory=Verification, metadata={"view": Verification})
    evaluation: Evaluation = field(default_factory=Evaluation, metadata={"view": Evaluation})


@dataclass(frozen=True, kw_only=True)
class Cordon(View):
    """A worker finishes what it holds and takes nothing new. `by`: operator, or service where jobs failed on it."""

    by: str = ""
    reason: str | None = None
    at: float = 0.0
    evidence: list[dict[str, Any]] | None = None
    """For operators: how the attempts ended for which the service cordoned it."""


@dataclass(frozen=True, kw_only=True)
class Worker(View):
    """A process that trains, and what it holds resident."""

    id: str = ""
    host: str = ""
    state: str = ""
    protocol: int | None = None
    cordon: Cordon | None = field(default=None, metadata={"view": Cordon})
    """Why it takes nothing new; None: it does."""
    version: str = ""
    devices: list[Any] = field(default_factory=list[Any])
    memory_bytes: int = 0
    resident_base: str | None = None
    resident_base_names: list[str] = field(default_factory=list[str])
    trainer_id: str | None = None
    last_seen_at: int | None = None
