"""Typed fields of job and sweep requests beyond OpenAI's. The service checks their limits."""

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
    """List of names, "all-linear", or "re:" followed by a regular expression for whole paths."""
    layers_to_transform: list[int] | None
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    use_rslora: bool
    use_dora: bool
    init_lora_weights: str
    """"default", "gaussian", "pissa", "pissa_niter_N" or "olora"."""


class Optimizer(TypedDict, total=False):
    """`learning_rate` is the peak rate. beta1, beta2 and eps apply to adamw, momentum to sgd, and beta2_decay,
    clip_threshold and scale_floor to adafactor."""

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
    """Prompts, completed by greedy decoding at each evaluation."""
    max_tokens: int
    """Maximum length of one completion."""


class EvaluationRule(TypedDict, total=False):
    every_steps: int | Auto
    keep: Literal["last", "best"] | Auto
    samples: Samples | None


class EarlyStopping(TypedDict, total=False):
    """`patience` is a number of evaluations; `min_delta` is in nats."""

    patience: int
    min_delta: float


class Data(TypedDict, total=False):
    loss: Literal["assistant", "last_turn"]
    """For chats: train on every assistant message, or only on the last one."""
    overflow: Literal["truncate", "drop", "split"]
    """Treatment of rows with more than `max_length` tokens. Only plain texts can be split."""


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


class Integration(TypedDict, total=False):
    """A tracker to which the job's metrics are written, with its options under its own name."""

    type: Required[Literal["wandb", "mlflow", "tensorboard"]]
    wandb: Wandb
    mlflow: Mlflow
    tensorboard: TensorBoard


class Hyperparameters(TypedDict, total=False):
    batch_size: int | Auto
    learning_rate_multiplier: float | Auto
    n_epochs: int | Auto


class SupervisedHyperparameters(Hyperparameters, total=False):
    label_smoothing: float
    neftune_alpha: float
    """Scale of the noise on input embeddings during training; 0 disables it."""


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
    """Devices of a job: one."""

    devices: Literal[1]
    strategy: Literal["auto", "single"]


SearchType = Literal["grid", "random", "asha", "ask_tell"]
KeepAdapters = Literal["all", "best"]


class Parameter(TypedDict, total=False):
    """Possible values of a field in a sweep's trials: one of `values`, or a number from `min` to `max`."""

    values: list[Any]
    min: float
    max: float
    scale: Literal["linear", "log"]
    points: int
    """Number of points of a range in a grid search."""


class _SearchType(TypedDict):
    type: SearchType


class Search(_SearchType, total=False):
    """`trials` applies to all types except grid; the last three fields apply to asha."""

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
    """Fields of a job other than its model and training file. None: the service's default."""

    validation_file: str | None
    suffix: str | None
    seed: int | None
    metadata: Mapping[str, str] | None
    tags: list[str] | None
    resources: Resources | None
    method: MethodType | None
    hyperparameters: AnyHyperparameters | None
    """Hyperparameters of the method; of "supervised" if no method is set."""
    parent_adapter: str | None
    """Id or name of an adapter to continue from."""
    must_serve_on: str | None
    """"vllm", or a serving endpoint. The job is rejected unless its adapter can run there."""
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
    """Unix time. If the job can't meet it, an event reports it and the job continues."""
    integrations: Sequence[Integration] | None
    """Trackers to which the metrics are also written."""
    extra_body: Mapping[str, Any] | None
    """Raw fields of the request body. They override the other fields."""


def job_body(fields: JobFields, **named: str | None) -> dict[str, Any]:
    """Return the body of a request for a job or a plan."""
    body: dict[str, Any] = {**named, **fields}
    extra, method, numbers = (body.pop(name, None) for name in ("extra_body", "method", "hyperparameters"))
    if method or numbers:
        chosen = method or "supervised"
        body["method"] = {"type": chosen, **({chosen: {"hyperparameters": numbers}} if numbers else {})}
    return {name: value for name, value in body.items() if value is not None} | dict(extra or {})
