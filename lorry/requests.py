# Generated from the OpenAPI document by `make docs`; do not edit.
"""Fields of requests for jobs, plans and sweeps."""

from __future__ import annotations

from typing import Any, Literal, Required, TypeAlias, TypedDict


class Data(TypedDict, total=False):
    """How the rows of the training file and the validation file are used."""

    loss: Literal["assistant", "last_turn"]
    """Trained tokens of a chat. assistant: every assistant message whose weight is not 0. last_turn: only the last assistant message (chats only)."""
    overflow: Literal["truncate", "drop", "split"]
    """Handling of rows with more than max_length tokens. truncate: keep the start. drop: skip the row. split: split the row into consecutive pieces of max_length tokens (plain texts only)."""


class DpoHyperparameters(TypedDict, total=False):
    """Direct preference optimization (arXiv 2305.18290)."""

    batch_size: int | Literal["auto"]
    """Rows per optimizer step. auto: about 0.5% of the rows, as a power of two from 4 to 32."""
    learning_rate_multiplier: float | Literal["auto"]
    """Factor on the default rate. auto: 1, or 0.1 if not supervised."""
    n_epochs: int | Literal["auto"]
    """Passes over the training file. auto: 3."""
    beta: float | Literal["auto"]
    """Strength of the penalty for differing from the reference model. auto: 0.1."""
    loss_type: Literal["sigmoid", "ipo"]
    """Loss of the margin: sigmoid, or ipo for the squared loss of the mean log ratios (arXiv 2310.12036)."""
    label_smoothing: float
    """Assumed fraction of mislabeled pairs (sigmoid only)."""


class EarlyStopping(TypedDict, total=False):
    """Early stopping: the job succeeds before its last step if the validation loss no longer improves."""

    patience: Required[int]
    """Consecutive evaluations without improvement before the job stops."""
    min_delta: float
    """An improvement lowers the validation loss by more than this, in nats."""


class Hyperparameters(TypedDict, total=False):
    """OpenAI's three hyperparameters."""

    batch_size: int | Literal["auto"]
    """Rows per optimizer step. auto: about 0.5% of the rows, as a power of two from 4 to 32."""
    learning_rate_multiplier: float | Literal["auto"]
    """Factor on the default rate. auto: 1, or 0.1 if not supervised."""
    n_epochs: int | Literal["auto"]
    """Passes over the training file. auto: 3."""


KeepAdapters: TypeAlias = Literal["all", "best"]


class KtoHyperparameters(TypedDict, total=False):
    """Kahneman-Tversky optimization (arXiv 2402.01306)."""

    batch_size: int | Literal["auto"]
    """Answers per optimizer step, at least 2 because each is also paired with the prompt of another. auto: about 0.5% of the rows, as a power of two from 4 to 32."""
    learning_rate_multiplier: float | Literal["auto"]
    """Factor on the default rate. auto: 1, or 0.1 if not supervised."""
    n_epochs: int | Literal["auto"]
    """Passes over the training file. auto: 3."""
    beta: float | Literal["auto"]
    """Strength of the penalty for differing from the reference model. auto: 0.1."""
    desirable_weight: float
    """Loss weight of answers with the label true."""
    undesirable_weight: float
    """Loss weight of answers with the label false."""


class Lora(TypedDict, total=False):
    """The adapter configuration."""

    rank: int
    """Rank r of the update B·A."""
    alpha: float | Literal["auto"]
    """Scales the update by alpha/rank. auto: 2·rank."""
    dropout: float
    """Dropout probability of the inputs of A."""
    target_modules: Literal["all-linear"] | str | list[str]
    """Linear layers to adapt: a list of layer names or ends of paths, 're:' and a regular expression that matches whole paths, or all-linear for all layers except the output head."""
    layers_to_transform: list[int] | None
    """Numbers of the blocks to adapt, from 0. None: all blocks."""
    rank_pattern: dict[str, int]
    """Ranks of individual layers. The key is a path, the end of a path, or a regular expression."""
    alpha_pattern: dict[str, float]
    """Alphas of individual layers; keys as in rank_pattern."""
    use_rslora: bool
    """Rank-stabilized LoRA: scale by alpha/sqrt(rank) (arXiv 2312.03732)."""
    use_dora: bool
    """DoRA: also train a magnitude for each output (arXiv 2402.09353)."""
    init_lora_weights: str
    """Initialization of A and B: default (Kaiming-uniform A, zero B), gaussian, pissa (arXiv 2404.02948), pissa_niter_N with N from 1 to 99, or olora (arXiv 2406.01775)."""


Metric: TypeAlias = Literal[
    "valid_loss",
    "valid_mean_token_accuracy",
    "valid_reward_accuracy",
    "valid_reward_margin",
    "train_loss",
    "train_mean_token_accuracy",
]


class Mlflow(TypedDict, total=False):
    """An MLflow tracking server."""

    experiment: str
    """Experiment. The name of the Lorry project and '/' are added in front."""
    run_name: str | None
    """Name of the run. Default: the job ID."""
    tags: dict[str, Any] | None
    """Tags of the run. None: none."""


class Objective(TypedDict, total=False):
    """The metric by which trials are compared."""

    metric: Literal[
        "valid_loss",
        "valid_mean_token_accuracy",
        "valid_reward_accuracy",
        "valid_reward_margin",
        "train_loss",
        "train_mean_token_accuracy",
    ]
    """Metric of a trial: its latest value, and after training the value of the adapter. train_… metrics are means over the last 10 steps. valid_reward_… metrics are not available for the method supervised."""
    goal: Literal["minimize", "maximize"] | Literal["auto"]
    """auto: minimize a loss, maximize other metrics."""


class Optimizer(TypedDict, total=False):
    """AdamW (arXiv 1711.05101), SGD with momentum, or Adafactor (arXiv 1804.04235), as implemented by torch."""

    type: Literal["adamw", "sgd", "adafactor"]
    """Optimization algorithm of the job."""
    learning_rate: float | Literal["auto"]
    """Peak learning rate. auto: 0.0002 times learning_rate_multiplier. sgd and adafactor require one of the two fields."""
    lora_plus_ratio: float
    """LoRA+: learning rate of B and of DoRA's magnitudes, divided by that of A (arXiv 2402.12354)."""
    beta1: float
    """Decay of the first moment (adamw only)."""
    beta2: float
    """Decay of the second moment (adamw only)."""
    eps: float
    """Added to the denominator (adamw only)."""
    momentum: float
    """Momentum (sgd only)."""
    beta2_decay: float
    """Step s weights its squared gradients by s^beta2_decay (adafactor only)."""
    clip_threshold: float
    """Maximum root mean square of an update (adafactor only; d in torch)."""
    scale_floor: float
    """Lower bound for the root mean square of a matrix (adafactor only; epsilon2 in torch). B starts at zero; until it has grown, a step changes it by at most the learning rate times this value."""
    weight_decay: float
    """Weight decay: added to the gradient for sgd, decoupled for the others."""
    max_grad_norm: float | None
    """Clip the gradient of the job to this norm. None: no clipping."""


class OrpoHyperparameters(TypedDict, total=False):
    """Odds ratio preference optimization (arXiv 2403.07691)."""

    batch_size: int | Literal["auto"]
    """Rows per optimizer step. auto: about 0.5% of the rows, as a power of two from 4 to 32."""
    learning_rate_multiplier: float | Literal["auto"]
    """Factor on the default rate. auto: 1, or 0.1 if not supervised."""
    n_epochs: int | Literal["auto"]
    """Passes over the training file. auto: 3."""
    beta: float | Literal["auto"]
    """Weight of the odds ratio loss (lambda in the paper). auto: 0.1."""


class Parameter(TypedDict, total=False):
    """The possible values of a field: a list of `values`, or a range from `min` to `max`."""

    values: list[Any] | None
    """The possible values. None: a range."""
    min: float | None
    """Lower end of the range. None: `values` are set."""
    max: float | None
    """Upper end of the range. None: `values` are set."""
    scale: Literal["linear", "log"]
    """Scale of the range. log: equal ratios are equally likely; min must be above 0."""
    points: int | None
    """Number of values from min to max, evenly spaced on the scale (grid only). None: not a grid, or `values` are set."""


Priority: TypeAlias = Literal["urgent", "normal", "batch"]


class Resources(TypedDict, total=False):
    """Devices of a job. Its memory is estimated from the other fields."""

    devices: Literal[1]
    """Number of devices. Must be 1."""
    strategy: Literal["auto", "single"]
    """Distribution across devices. auto: single."""


class Samples(TypedDict, total=False):
    """Prompts that are answered by greedy decoding. They do not affect training."""

    prompts: Required[list[str]]
    """A prompt is a user message if the training rows are chats, else a text to continue."""
    max_tokens: int
    """Maximum tokens of an answer."""


class Schedule(TypedDict, total=False):
    """The learning rate schedule over the steps of the job."""

    type: Literal["constant", "linear", "cosine", "wsd"]
    """Curve of the learning rate. wsd: warm-up, peak learning rate, linear decay to zero (arXiv 2405.18392)."""
    warmup_ratio: float
    """Fraction of all n steps for warm-up. The first w = min(⌈ratio·n⌉, n - 1) steps warm up: step s uses s/(w + 1) of the peak learning rate."""
    decay_ratio: float | None
    """Fraction of all n steps for the decay, which are ⌈ratio·n⌉ steps (wsd only). None: 0.2."""


class Search(TypedDict, total=False):
    """The search method: how parameters are chosen, and whether bad trials are stopped early."""

    type: Required[Literal["grid", "random", "tpe", "asha"]]
    """grid: every combination. random: `trials` independent samples. tpe: `trials` samples that learn from the trials that have ended (tree-structured Parzen estimator). asha: random with the pruner asha."""
    trials: int | None
    """Number of trials. None: a grid, with one trial per combination."""
    seed: int | None
    """Seed for sampling, and for trials whose job sets none. None: chosen at random and returned."""
    pruner: Literal["asha"] | None
    """asha: compare trials at rungs, and stop the worse ones (asynchronous successive halving, arXiv 1810.05934). None: stop no trial, unless the type is asha."""
    reduction_factor: int | None
    """At each rung, the best 1 of this many trials continues (asha only). None: 3."""
    min_steps: int | None
    """Optimizer steps before the first rung (asha only). Each further rung is at reduction_factor times the steps. None: chosen so that three rungs come before the last step."""


class SimpoHyperparameters(TypedDict, total=False):
    """Simple preference optimization (arXiv 2405.14734)."""

    batch_size: int | Literal["auto"]
    """Rows per optimizer step. auto: about 0.5% of the rows, as a power of two from 4 to 32."""
    learning_rate_multiplier: float | Literal["auto"]
    """Factor on the default rate. auto: 1, or 0.1 if not supervised."""
    n_epochs: int | Literal["auto"]
    """Passes over the training file. auto: 3."""
    beta: float | Literal["auto"]
    """Scale of the mean log probabilities. auto: 2."""
    gamma: float | Literal["auto"]
    """Target margin between the two answers. auto: half of beta."""


class SupervisedHyperparameters(TypedDict, total=False):
    """Hyperparameters of the method supervised."""

    batch_size: int | Literal["auto"]
    """Rows per optimizer step. auto: about 0.5% of the rows, as a power of two from 4 to 32."""
    learning_rate_multiplier: float | Literal["auto"]
    """Factor on the default rate. auto: 1, or 0.1 if not supervised."""
    n_epochs: int | Literal["auto"]
    """Passes over the training file. auto: 3."""
    label_smoothing: float
    """Fraction of the label probability that is spread over the vocabulary. Training loss only."""
    neftune_alpha: float
    """NEFTune noise scale on input embeddings in training (arXiv 2310.05914). 0: off."""


class TensorBoard(TypedDict, total=False):
    """A directory of TensorBoard event files."""

    name: str | None
    """Prefix of the run's directory, before the job ID. None: none."""


class Wandb(TypedDict, total=False):
    """Weights & Biases, in OpenAI's format."""

    project: Required[str]
    """W&B project. The name of the Lorry project and ' - ' are added in front."""
    name: str | None
    """Name of the run. Default: the job ID."""
    entity: str | None
    """Rejected: the operator sets the team or user (`WANDB_ENTITY` on the workers). None: that of the operator."""
    tags: list[str] | None
    """Tags of the run. None: none."""


class EvaluationRule(TypedDict, total=False):
    """Evaluations on the validation file. A job is always evaluated before its first step and at its end."""

    every_steps: int | Literal["auto"]
    """Optimizer steps between evaluations. auto: ten evaluations over the job."""
    keep: Literal["last", "best"] | Literal["auto"]
    """Weights that become the adapter. last: those of the last step. best: those of the evaluation with the lowest validation loss. auto: best with early_stopping, else last."""
    samples: Samples | None
    """Prompts that are answered at each evaluation, in events as data.samples. None: none."""


class Integration(TypedDict, total=False):
    """A tracker type, and its options under the name of the type."""

    type: Required[Literal["wandb", "mlflow", "tensorboard"]]
    """Tracker to write to."""
    wandb: Wandb | None
    """Options of Weights & Biases. None: another type."""
    mlflow: Mlflow | None
    """Options of MLflow. None: the defaults."""
    tensorboard: TensorBoard | None
    """Options of TensorBoard. None: the defaults."""


class JobFields(TypedDict, total=False):
    """Fields of a job other than its model and training file. None: the service's default."""

    validation_file: str | None
    """ID of another such file, for the validation loss. None: no evaluations."""
    method: Literal["supervised", "dpo", "orpo", "simpo", "kto"] | None
    """Training method: supervised (on answers), dpo, orpo or simpo (on pairs of answers), or kto (on answers labeled as desirable or undesirable)."""
    hyperparameters: (
        DpoHyperparameters
        | Hyperparameters
        | KtoHyperparameters
        | OrpoHyperparameters
        | SimpoHyperparameters
        | SupervisedHyperparameters
        | None
    )
    """Hyperparameters of the method; of "supervised" if no method is set."""
    suffix: str | None
    """Part of the adapter's name. Accents and other characters outside ASCII are removed. Characters other than letters, digits, `.`, `_` and `-` become `-`. None: none."""
    seed: int | None
    """Seed of everything random in the job. None: drawn at random, and recorded."""
    metadata: dict[str, str] | None
    """Labels of the job, as key-value pairs. None: none."""
    integrations: list[Integration] | None
    """Trackers to which the job's curves are written, each at most once. None: none."""
    tags: list[str] | None
    """Tags for finding jobs, like metadata: GET /v1/fine_tuning/jobs?tag=NAME. None: none."""
    resources: Resources | None
    """Devices of the job. None: one device."""
    parent_adapter: str | None
    """ID or name of an adapter of the same base model to continue from. Its weights are copied. `lora` and `quantization` are inherited; a different value is an error, except lora.dropout, which is not inherited. None: none."""
    must_serve_on: str | None
    """Reject the job unless its adapter can run there: vllm, or the name or ID of a serving endpoint. Depends on rank, DoRA, patterns and the base model's architecture. None: not checked."""
    lora: Lora | None
    """The adapter configuration."""
    optimizer: Optimizer | None
    """AdamW (arXiv 1711.05101), SGD with momentum, or Adafactor (arXiv 1804.04235), as implemented by torch."""
    schedule: Schedule | None
    """The learning rate schedule over the steps of the job."""
    evaluation: EvaluationRule | None
    """Evaluations on the validation file. A job is always evaluated before its first step and at its end."""
    data: Data | None
    """How the rows of the training file and the validation file are used."""
    early_stopping: EarlyStopping | None
    """Stop early when the validation loss no longer improves. None: train all steps."""
    precision: Literal["auto", "bfloat16", "float32"] | None
    """Precision of the base model. auto: bf16, or fp32 if there are workers but none has bf16."""
    quantization: Literal["none", "nf4", "int8"] | None
    """Quantization of the base model's linear layers during training, by bitsandbytes: nf4 (4 bits, as in QLoRA, arXiv 2305.14314) or int8 (arXiv 2208.07339, without outlier columns). none: the layers have the dtype `precision`. The adapter is verified on the quantized base model."""
    max_length: int | Literal["auto"] | None
    """Maximum tokens of a row (see data.overflow). auto: the base model's, at most 4096."""
    max_steps: int | None
    """Maximum number of optimizer steps. None: all epochs."""
    checkpoint_every_steps: int | Literal["auto"] | None
    """Optimizer steps between checkpoints. auto: 50."""
    priority: Literal["urgent", "normal", "batch"] | None
    """Priority class, up to the highest priority of the project and of the API key."""
    deadline: int | None
    """Time by which the job should finish, in Unix seconds. Among the project's jobs of the same class, jobs with a deadline go first, ordered by latest start. A job that can't meet its deadline gets a warning event and keeps running. None: no deadline."""
    extra_body: dict[str, Any] | None
    """Raw fields of the request body. They override the other fields."""
