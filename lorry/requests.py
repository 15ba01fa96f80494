"""What a job or a sweep may ask for beyond OpenAI's fields, typed for editors. Limits are the service's to check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Required, TypedDict

Auto = Literal["auto"]
Priority = Literal["urgent", "normal", "batch"]
Precision = Literal["auto", "bfloat16", "float32"]
Quantization = Literal["none", "nf4", "int8"]
MethodType = Literal["supervised", "dpo", "orpo", "simpo", "kto"]


class Lora(TypedDict, total=False):
    rank: int
    alpha: float | Auto
    dropout: float
    target_modules: list[str] | str
    """Names, "all-linear", or "re:" and a regular expression of whole paths."""
    layers_to_transform: list[int] | None
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    use_rslora: bool
    use_dora: bool
    init_lora_weights: str
    """"default", "gaussian", "pissa", "pissa_niter_N" or "olora"."""


class Optimizer(TypedDict, total=False):
    """`learning_rate` is the peak rate. beta1, beta2 and eps are adamw's, momentum is sgd's; beta2_decay,
    clip_threshold and scale_floor are adafactor's."""

    type: Literal["adamw", "sgd", "adafactor"]
    learning_rate: float | Auto
    lora_plus_ratio: float
    beta1: float
    beta2: float
    eps: float
    momentum: float
    beta2_decay: float
    clip_threshold: float
    scale_floor: float
    weight_decay: float
    max_grad_norm: float | None


class Schedule(TypedDict, total=False):
    type: Literal["constant", "linear", "cosine", "wsd"]
    warmup_ratio: float
    decay_ratio: float | None


class Samples(TypedDict, total=False):
    prompts: list[str]
    """Answered greedily at each evaluation."""
    max_tokens: int
    """Of one answer."""


class EvaluationRule(TypedDict, total=False):
    every_steps: int | Auto
    keep: Literal["last", "best"] | Auto
    samples: Samples | None


class EarlyStopping(TypedDict, total=False):
    """`patience` counts evaluations; `min_delta` is in nats."""

    patience: int
    min_delta: float


class Data(TypedDict, total=False):
    loss: Literal["assistant", "last_turn"]
    """Of a chat: every answer, or only the last one."""
    overflow: Literal["truncate", "drop", "split"]
    """What becomes of rows of more than `max_length` tokens; only plain texts are split."""


class Wandb(TypedDict, total=False):
    project: Required[str]
    name: str
    entity: str
    tags: list[str]


class Mlflow(TypedDict, total=False):
    experiment: str
    run_name: str
    tags: dict[str, str]


class TensorBoard(TypedDict, total=False):
    name: str


class Trackio(TypedDict, total=False):
    project: str
    name: str


class Integration(TypedDict, total=False):
    """A tracker that the job's curves are written to, and what is said to it under its own name."""

    type: Required[Literal["wandb", "mlflow", "tensorboard", "trackio"]]
    wandb: Wandb
    mlflow: Mlflow
    tensorboard: TensorBoard
    trackio: Trackio


class Hyperparameters(TypedDict, total=False):
    batch_size: int | Auto
    learning_rate_multiplier: float | Auto
    n_epochs: int | Auto


class SupervisedHyperparameters(Hyperparameters, total=False):
    label_smoothing: float
    neftune_alpha: float
    """Of the noise on input embeddings in training; 0 is none."""


class DpoHyperparameters(Hyperparameters, total=False):
    beta: float | Auto
    loss_type: Literal["sigmoid", "ipo"]
    label_smoothing: float


class OrpoHyperparameters(Hyperparameters, total=False):
    beta: float | Auto


class SimpoHyperparameters(Hyperparameters, total=False):
    beta: float | Auto
    gamma: float | Auto


class KtoHyperparameters(Hyperparameters, total=False):
    beta: float | Auto
    desirable_weight: float
    undesirable_weight: float


AnyHyperparameters = (
    Hyperparameters
    | SupervisedHyperparameters
    | DpoHyperparameters
    | OrpoHyperparameters
    | SimpoHyperparameters
    | KtoHyperparameters
)


class Resources(TypedDict, total=False):
    """Where a job trains: on one device."""

    devices: Literal[1]
    strategy: Literal["auto", "single"]


SearchType = Literal["grid", "random", "asha", "ask_tell"]
KeepAdapters = Literal["all", "best"]


class Parameter(TypedDict, total=False):
    """What a field of a sweep's trials may be: one of `values`, or a number from `min` to `max`."""

    values: list[Any]
    min: float
    max: float
    scale: Literal["linear", "log"]
    points: int
    """Of a range in a grid."""


class _SearchType(TypedDict):
    type: SearchType


class Search(_SearchType, total=False):
    """`trials` of all but a grid; the last three of asha."""

    trials: int
    seed: int
    reduction_factor: int
    min_steps: int
    max_rungs: int


Metric = Literal[
    "valid_loss",
    "valid_mean_token_accuracy",
    "valid_reward_accuracy",
    "valid_reward_margin",
    "train_loss",
    "train_mean_token_accuracy",
]


class Objective(TypedDict, total=False):
    metric: Metric
    goal: Literal["auto", "minimize", "maximize"]


class JobFields(TypedDict, total=False):
    """What may be said of a job beside its model and its training file. None: the service's default."""

    validation_file: str | None
    suffix: str | None
    seed: int | None
    metadata: Mapping[str, str] | None
    tags: list[str] | None
    resources: Resources | None
    method: MethodType | None
    hyperparameters: AnyHyperparameters | None
    """Of the method, "supervised" where none is named."""
    parent_adapter: str | None
    """Id or name of one to continue."""
    lora: Lora | None
    optimizer: Optimizer | None
    schedule: Schedule | None
    evaluation: EvaluationRule | None
    data: Data | None
    early_stopping: EarlyStopping | None
    precision: Precision | None
    quantization: Quantization | None
    max_length: int | Auto | None
    max_steps: int | None
    checkpoint_every_steps: int | Auto | None
    priority: Priority | None
    deadline: int | None
    """Seconds since 1970. A job that can't meet it is told so, and goes on."""
    integrations: Sequence[Integration] | None
    """Trackers that the curves are written to, beside the record."""
    extra_body: Mapping[str, Any] | None
    """Fields of the body as they go over the wire, in place of the others."""


def job_body(fields: JobFields, **named: str | None) -> dict[str, Any]:
    """The body of a request for a job, or for a plan of one."""
    body: dict[str, Any] = {**named, **fields}
    extra, method, numbers = (body.pop(name, None) for name in ("extra_body", "method", "hyperparameters"))
    if method or numbers:
        chosen = method or "supervised"
        body["method"] = {"type": chosen, **({chosen: {"hyperparameters": numbers}} if numbers else {})}
    return {name: value for name, value in body.items() if value is not None} | dict(extra or {})
