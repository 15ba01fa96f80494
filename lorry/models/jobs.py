"""Responses of the service as dataclasses. Unknown fields are kept in `raw`; missing fields have a default value.

An older client therefore works with a newer service, and the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, cast

FINAL_STATUSES = frozenset({"succeeded", "failed", "cancelled"})


@dataclass(frozen=True, kw_only=True)
class View:
    """A JSON object of the API. A field whose metadata has a `view` is itself such an object."""

    raw: dict[str, Any] = field(default_factory=dict[str, Any], repr=False, compare=False)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        values: dict[str, Any] = {}
        for known in fields(cls):
            value = data.get(known.name)
            if known.name == "raw" or value is None:
                continue
            view: type[View] | None = known.metadata.get("view")
            if view is None:
                values[known.name] = value
            elif isinstance(value, Mapping):
                values[known.name] = view.of(cast("Mapping[str, Any]", value))
        return cls(**values, raw=dict(data))


@dataclass(frozen=True, kw_only=True)
class File(View):
    """An uploaded file. `bytes` is its size; `kind` is the kind of a dataset's rows: chat, completion, text, preference
    or unpaired."""

    id: str = ""
    filename: str = ""
    purpose: str = ""
    bytes: int = 0
    rows: int | None = None
    kind: str | None = None
    same_content_as: str | None = None
    """After an upload: id of an earlier file with the same bytes."""
    digest: str = ""
    """SHA-256 of the content."""
    expires_at: int | None = None
    """Unix time at which it is deleted, once no unfinished job uses it."""
    status: str = ""
    created_at: int = 0


@dataclass(frozen=True, kw_only=True)
class Progress(View):
    """Progress of a job. `seconds_left` is an estimate; `valid_loss` is the latest validation loss."""

    step: int = 0
    num_steps: int = 0
    epoch: float | None = None
    loss: float | None = None
    valid_loss: float | None = None
    best_valid_loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    kept_step: int | None = None
    """Step of the exported weights; None before the end."""
    kept_valid_loss: float | None = None
    """Validation loss of the adapter, at `kept_step`."""
    stopped_early: str | None = None
    """Reason why the job ended before its last step."""


@dataclass(frozen=True, kw_only=True)
class JobFailure(View):
    """The error with which a job failed. `param` is the invalid field or file."""

    code: str = ""
    message: str = ""
    remedy: str = ""
    param: str | None = None


@dataclass(frozen=True, kw_only=True)
class Reproduction(View):
    """The adapter that a job trains again from its lineage record, and the comparison of the two.

    `identical`, `message` and the fields after them are None until the job has succeeded.
    """

    adapter: str = ""
    name: str = ""
    lineage_id: str = ""
    expected: dict[str, str | None] = field(default_factory=dict[str, "str | None"])
    """The recorded SHA-256 digests: `weights` and `loss_log`."""
    reproduced: dict[str, str | None] | None = None
    identical: bool | None = None
    differences: list[dict[str, Any]] | None = None
    """`field`, `recorded` and `reproduced` of each condition that differs between the two trainings."""
    machines: dict[str, list[dict[str, Any]]] | None = None
    """`recorded` and `reproduced`: `attempt`, `worker`, `from_step` and conditions of each machine that trained."""
    is_difference_expected: bool | None = None
    message: str | None = None


@dataclass(frozen=True, kw_only=True)
class Job(View):
    """A fine-tuning job with its resolved configuration."""

    id: str = ""
    status: str = ""
    phase: str | None = None
    """Phase of a running job: loading, training or verifying."""
    model: str = ""
    parent_adapter: str | None = None
    """Name of the adapter from which the job continues."""
    reproduces: Reproduction | None = field(default=None, metadata={"view": Reproduction})
    """None if the job was not created by `adapters.reproduce`."""
    training_file: str = ""
    validation_file: str | None = None
    fine_tuned_model: str | None = None
    adapter_id: str | None = None
    result_files: list[str] = field(default_factory=list[str])
    """File ids. A job that has succeeded has one: its curves, as CSV with OpenAI's columns."""
    suffix: str | None = None
    created_at: int = 0
    started_at: int | None = None
    finished_at: int | None = None
    seconds_running: float | None = None
    """Seconds under a worker's claim, over all attempts. Waiting and pauses do not count."""
    trained_tokens: int | None = None
    seed: int | None = None
    priority: str | None = None
    deadline: int | None = None
    """Unix time. If the job can't meet it, an event reports it and the job continues."""
    is_held: bool = False
    """The job stays in the queue and does not start until it is released."""
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
    """For a trial: id of its sweep, number of the trial, and its parameters."""
    integrations: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    tags: list[str] = field(default_factory=list[str])
    progress: Progress = field(default_factory=Progress, metadata={"view": Progress})
    error: JobFailure | None = field(default=None, metadata={"view": JobFailure})

    @property
    def is_final(self) -> bool:
        """Whether its status is succeeded, failed or cancelled."""
        return self.status in FINAL_STATUSES


@dataclass(frozen=True, kw_only=True)
class JobEvent(View):
    """An event of a job."""

    id: str = ""
    created_at: int = 0
    level: Literal["info", "warn", "error"] = "info"
    message: str = ""
    type: str = "message"
    data: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class LogLine(View):
    """A line that a trainer printed while it held the job. `rank` is the rank of the trainer process."""

    id: str = ""
    attempt: int = 0
    rank: int = 0
    number: int = 0
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Sample(View):
    """A job's completion of one of its sample prompts."""

    step: int = 0
    """Optimizer steps of the job before the evaluation."""
    prompt: str = ""
    """Prompt of the job's `evaluation.samples`."""
    answer: str = ""
    """Text that the model generated."""
    num_tokens: int = 0
    """Number of tokens of the answer."""
    is_complete: bool = False
    """Whether the answer ended within the token limit."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint(View):
    """A checkpoint from which a job can resume."""

    id: str = ""
    created_at: int = 0
    fine_tuning_job_id: str = ""
    fine_tuned_model_checkpoint: str = ""
    step_number: int = 0
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])
    available: bool = False
    """Whether it can be used as a model, by its `fine_tuned_model_checkpoint`."""


@dataclass(frozen=True, kw_only=True)
class Permission(View):
    """Permission of a project to read another project's adapter or checkpoint."""

    id: str = ""
    created_at: int = 0
    project_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Attempt(View):
    """One attempt of a job by one worker, with the jobs that shared its trainer."""

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
    """A message of a job's live stream."""

    kind: str = ""
    """job, event or metric: the only one of the last three fields that is set."""
    id: str = ""
    """ID of the message, after which a new stream can continue. Empty if it has none."""
    job: Job | None = None
    """The job with its new status or progress."""
    event: JobEvent | None = None
    """A new event of the job."""
    metric: dict[str, Any] | None = None
    """A new point of a curve, as in `jobs.metrics`."""


@dataclass(frozen=True, kw_only=True)
class Model(View):
    """A base model, an adapter or a checkpoint by name."""

    id: str = ""
    created: int = 0
    owned_by: str = ""
    kind: str = ""
    state: str = ""
    inference: str = ""
    base: str | None = None
    digest: str | None = None
    source: str | None = None
    revision: str | None = None
    local_path: str | None = None
    description: dict[str, Any] | None = None
    error: JobFailure | None = field(default=None, metadata={"view": JobFailure})


@dataclass(frozen=True, kw_only=True)
class Verification(View):
    """Difference between PEFT's logits and those of training, measured when the adapter was exported."""

    passed: bool | None = None
    max_abs_diff: float | None = None
    tolerance: float | None = None
    worst_linear: str | None = None
    worst_linear_error: float | None = None
    explanation: str | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation(View):
    """Mean loss per trained token on the validation file, for the adapter, and for the base model or parent adapter
    with which its job started."""

    base_loss: float | None = None
    parent_loss: float | None = None
    loss: float | None = None
    base_perplexity: float | None = None
    parent_perplexity: float | None = None
    perplexity: float | None = None
    rewards: dict[str, float | None] | None = None
    """For preference jobs, which have no perplexity: chosen, rejected, margin, accuracy, and for kto kl."""


@dataclass(frozen=True, kw_only=True)
class Efficiency(View):
    """The adapter compared with full fine-tuning of its base model."""

    parameters: dict[str, Any] = field(default_factory=dict[str, Any])
    """`trainable`, `base` and their ratio, `share`."""
    size: dict[str, Any] = field(default_factory=dict[str, Any])
    """`bytes`, `base_bytes` and their ratio, `share`."""
    training_memory: dict[str, Any] | None = None
    """`lora` and `full_fine_tuning`, computed in bytes by component; `share` of the totals; `measured`."""
    inference_latency: dict[str, Any] | None = None
    """`base_seconds`, `merged_seconds` and `ratio`. None until an export measures it."""


@dataclass(frozen=True, kw_only=True)
class Adapter(View):
    """A trained adapter. `artifact` is the digest of its manifest."""

    id: str = ""
    name: str = ""
    created_at: int = 0
    job_id: str = ""
    owned_by: str = ""
    """Id of the project that trained it. Shared adapters belong to another project."""
    checkpoint_step: int | None = None
    """Step of a checkpoint, which can be read like an adapter."""
    base_model: str = ""
    base_digest: str = ""
    parent: str | None = None
    """Name of the adapter from which it continues."""
    artifact: str = ""
    bytes: int = 0
    num_parameters: int = 0
    rank: int | None = None
    precision: str | None = None
    """Precision of the base model in training and verification. Serve the adapter with it and with `quantization`."""
    quantization: str | None = None
    lineage_id: str = ""
    efficiency: Efficiency | None = field(default=None, metadata={"view": Efficiency})
    verification: Verification = field(default_factory=Verification, metadata={"view": Verification})
    evaluation: Evaluation = field(default_factory=Evaluation, metadata={"view": Evaluation})


@dataclass(frozen=True, kw_only=True)
class Cordon(View):
    """The worker finishes the jobs it holds and claims no new ones. `by`: operator, or service after failed jobs."""

    by: str = ""
    reason: str | None = None
    at: float = 0.0
    evidence: list[dict[str, Any]] | None = None
    """Failed attempts for which the service cordoned the worker. Only operators see it."""


@dataclass(frozen=True, kw_only=True)
class Worker(View):
    """A worker and its loaded base model."""

    id: str = ""
    host: str = ""
    state: str = ""
    protocol: int | None = None
    cordon: Cordon | None = field(default=None, metadata={"view": Cordon})
    """None if the worker is not cordoned."""
    version: str = ""
    devices: list[Any] = field(default_factory=list[Any])
    memory_bytes: int = 0
    resident_base: str | None = None
    resident_base_names: list[str] = field(default_factory=list[str])
    trainer_id: str | None = None
    last_seen_at: int | None = None
