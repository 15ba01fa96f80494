# pyright: strict
"""What a job and an engine are told, checked on construction. No torch here: the api may read it cheaply."""

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Literal, cast, get_args

from lora_core.errors import ConfigError
from lora_core.module_paths import REGEX_PREFIX, compiles, pattern_value

ALL_LINEAR = "all-linear"
MAX_RANK = 1024
INIT = re.compile(r"default|gaussian|pissa|pissa_niter_[1-9]\d?|olora")
MAX_LABELS = 10_000
MAX_DROPOUT = 0.9
"""What is kept is scaled by 1 / (1 - dropout): past this, a step is noise."""
Kind = Literal["train", "evaluate"]
"""Of a slice: part of an optimizer step, or of an evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """W x + scale·B A x, with scale = alpha / rank, or alpha / √rank with `use_rslora` (arXiv 2312.03732).

    `target_modules`: "all-linear", one name, or several; a name matches a module path that it ends
    at a dot, as in PEFT. "re:PATTERN" is a regular expression over the whole path instead.
    `layers_to_transform`: only in the blocks of these numbers. `rank_pattern` and `alpha_pattern`: (key,
    value) pairs; the first key that matches a path, or its end after a dot, as a regular expression, gives
    the module another rank or alpha. `use_dora`: a learned length for each output's weights (dora.py).
    `modules_to_save`: trained in full; `trainable_token_indices`: tokens whose embeddings are
    (lora_core/adapter/modules_to_save.py).
    `init_lora_weights`: where A and B begin (lora_core/adapter/initialization.py): "default" (PEFT's True), "gaussian",
    "pissa",
    "pissa_niter_N" with a randomized decomposition of N iterations, or "olora".
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    layers_to_transform: tuple[int, ...] | None = None
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: tuple[int, ...] = ()
    init_lora_weights: str = "default"

    def __post_init__(self) -> None:
        require(1 <= self.rank <= MAX_RANK, "lora.rank", self.rank, f"between 1 and {MAX_RANK}")
        require(is_positive(self.alpha), "lora.alpha", self.alpha, "a positive number")
        require(0 <= self.dropout <= MAX_DROPOUT, "lora.dropout", self.dropout, f"between 0 and {MAX_DROPOUT}")
        self._require_targets()
        ranks_ok = all(compiles(key) and 1 <= rank <= MAX_RANK for key, rank in self.rank_pattern)
        require(ranks_ok, "lora.rank_pattern", self.rank_pattern, f"module names with ranks of 1 to {MAX_RANK}")
        init_ok = INIT.fullmatch(self.init_lora_weights) is not None
        expected = "default, gaussian, pissa, pissa_niter_N with N from 1 to 99, or olora"
        require(init_ok, "lora.init_lora_weights", self.init_lora_weights, expected)
        alphas_ok = all(compiles(key) and is_positive(alpha) for key, alpha in self.alpha_pattern)
        require(alphas_ok, "lora.alpha_pattern", self.alpha_pattern, "module names with positive numbers")
        saved, tokens = self.modules_to_save, self.trainable_token_indices
        require(all(saved) and len(set(saved)) == len(saved), "lora.modules_to_save", saved, "names, each once")
        tokens_ok = all(token >= 0 for token in tokens) and len(set(tokens)) == len(tokens)
        require(tokens_ok, "lora.trainable_token_indices", tokens, "numbers of tokens from 0, each once")

    def _require_targets(self) -> None:
        names = (self.target_modules,) if isinstance(self.target_modules, str) else self.target_modules
        named = bool(names) and all(name and name.strip() == name for name in names)
        require(named, "lora.target_modules", self.target_modules, "'all-linear' or module names")
        pattern = self.target_pattern
        pattern_ok = pattern is None or (pattern != "" and compiles(pattern))
        require(pattern_ok, "lora.target_modules", self.target_modules, "a regular expression after 're:'")
        layers = self.layers_to_transform
        layers_ok = layers is None or (len(layers) > 0 and min(layers) >= 0 and pattern is None)
        expected = "numbers from 0, or none; with a regular expression as target_modules none"
        require(layers_ok, "lora.layers_to_transform", layers, expected)

    @property
    def target_pattern(self) -> str | None:
        """The regular expression of `target_modules`; None where those are names."""
        wanted = self.target_modules
        if not isinstance(wanted, str) or not wanted.startswith(REGEX_PREFIX):
            return None
        return wanted.removeprefix(REGEX_PREFIX)

    @property
    def subtracts_start(self) -> bool:
        """Whether A and B begin with an update, which is then subtracted from the base model."""
        return self.init_lora_weights not in ("default", "gaussian")

    @property
    def pissa_iterations(self) -> int | None:
        """Of the randomized decomposition; None for the exact one."""
        _, found, number = self.init_lora_weights.partition("pissa_niter_")
        return int(number) if found else None

    def rank_of(self, module: str) -> int:
        return pattern_value(module, self.rank_pattern, self.rank)

    def alpha_of(self, module: str) -> float:
        return pattern_value(module, self.alpha_pattern, self.alpha)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)


OptimizerKind = Literal["adamw", "sgd", "adafactor"]
OPTIMIZERS: tuple[OptimizerKind, ...] = get_args(OptimizerKind)
MIN_EPS, MAX_EPS = 1e-37, 1e37
"""What fp32 holds with all its digits. A smaller one is 0 there, and 0 / 0 no number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101), SGD or Adafactor (arXiv 1804.04235); `max_grad_norm` None means no clipping.

    `lora_plus_ratio`: the rate of B, and of DoRA's magnitudes, over that of A (LoRA+, arXiv 2402.12354). What is
    trained in full has A's rate: heads, their biases too (to which PEFT gives B's), and embeddings of tokens.
    `momentum` belongs to SGD, whose decay is a part of the gradient, as in torch; betas and eps belong to AdamW.
    Adafactor moves each matrix by at most `learning_rate`, and by no more than 1 / √step, of its root mean square,
    which is taken to be no less than `scale_floor` (torch's epsilon2: B begins at zero). Step s gives the newest
    squares the weight s^`beta2_decay`, and an update is held to the root mean square `clip_threshold` (torch's d).
    """

    kind: OptimizerKind = "adamw"
    learning_rate: float
    lora_plus_ratio: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    momentum: float = 0.0
    beta2_decay: float = -0.8
    clip_threshold: float = 1.0
    scale_floor: float = 1e-3

    def __post_init__(self) -> None:
        require(self.kind in OPTIMIZERS, "optimizer.kind", self.kind, f"one of {', '.join(OPTIMIZERS)}")
        require(is_positive(self.learning_rate), "optimizer.learning_rate", self.learning_rate, "positive")
        require(is_positive(self.lora_plus_ratio), "optimizer.lora_plus_ratio", self.lora_plus_ratio, "positive")
        require(0 <= self.beta1 < 1, "optimizer.beta1", self.beta1, "at least 0 and below 1")
        require(0 <= self.beta2 < 1, "optimizer.beta2", self.beta2, "at least 0 and below 1")
        eps_ok = MIN_EPS <= self.eps <= MAX_EPS
        require(eps_ok, "optimizer.eps", self.eps, f"at least {MIN_EPS:g} and at most {MAX_EPS:g}")
        decay_ok = math.isfinite(self.weight_decay) and self.weight_decay >= 0
        require(decay_ok, "optimizer.weight_decay", self.weight_decay, "zero or positive")
        clip_ok = self.max_grad_norm is None or is_positive(self.max_grad_norm)
        require(clip_ok, "optimizer.max_grad_norm", self.max_grad_norm, "positive, or none")
        momentum_ok = 0 <= self.momentum < 1 and (self.kind == "sgd" or self.momentum == 0)
        require(momentum_ok, "optimizer.momentum", self.momentum, "at least 0 and below 1, and 0 without sgd")
        self._require_adafactor()

    def _require_adafactor(self) -> None:
        is_own = self.kind == "adafactor"
        for name, value, usual, is_right, expected in (
            ("beta2_decay", self.beta2_decay, -0.8, -math.inf < self.beta2_decay <= 0, "at most 0"),
            ("clip_threshold", self.clip_threshold, 1.0, 1 <= self.clip_threshold < math.inf, "at least 1"),
            ("scale_floor", self.scale_floor, 1e-3, is_positive(self.scale_floor), "positive"),
        ):
            number_ok = is_right and (is_own or value == usual)
            require(number_ok, f"optimizer.{name}", value, f"{expected}, and left out without adafactor")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate by step: linear warm-up, then constant, linear to zero, a half cosine to zero, or "wsd".

    Step s of w = `warmup_steps` has the rate peak · s / (w + 1), so no step is lost to a rate of 0; step
    w + 1 has the peak. "wsd" (warm-up, stable, decay: arXiv 2404.06395, 2405.18392) keeps the peak until the last
    `decay_steps`, over which it goes down in a line that reaches zero one step after the last.
    """

    kind: Literal["constant", "linear", "cosine", "wsd"]
    warmup_steps: int = 0
    decay_steps: int = 0
    num_steps: int

    def __post_init__(self) -> None:
        kind_ok = self.kind in ("constant", "linear", "cosine", "wsd")
        require(kind_ok, "schedule.kind", self.kind, "constant, linear, cosine or wsd")
        require(self.num_steps >= 1, "schedule.num_steps", self.num_steps, "at least 1")
        warmup_ok = 0 <= self.warmup_steps <= self.num_steps
        require(warmup_ok, "schedule.warmup_steps", self.warmup_steps, "between 0 and schedule.num_steps")
        longest = self.num_steps - self.warmup_steps if self.kind == "wsd" else 0
        expected = f"between 0 and {longest}, the steps after the warm-up" if longest else "0 without wsd"
        require(0 <= self.decay_steps <= longest, "schedule.decay_steps", self.decay_steps, expected)


ObjectiveKind = Literal["supervised", "dpo", "orpo", "simpo", "kto", "classification", "reward"]
OBJECTIVES: tuple[ObjectiveKind, ...] = get_args(ObjectiveKind)


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """What a job minimizes: cross-entropy of its labels, or a loss over pairs of answers
    (lora_core/losses/preference.py) or single ones (losses/preference.py). A number that the kind doesn't read is
    refused.

    `beta`: strength of a preference's reward (λ in the paper of ORPO). `loss_type` belongs to DPO, `gamma`, the margin
    that is asked for, to SimPO. `label_smoothing` is DPO's part of pairs taken to be swapped; of supervised jobs it is
    that of torch's CrossEntropyLoss, in training alone: held-out losses are plain cross-entropies. The weights of
    desirable and undesirable answers belong to KTO.
    Classification and reward need a base with a head for whole sequences: `num_labels` counts the classes of the
    former, 1 being the regression of a number; `center_rewards_coefficient` holds rewards round 0
    (lora_core/forward/classification.py).
    """

    kind: ObjectiveKind = "supervised"
    beta: float = 0.1
    gamma: float = 0.0
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    num_labels: int = 1
    center_rewards_coefficient: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        require(self.kind in OBJECTIVES, "objective.kind", self.kind, f"one of {', '.join(OBJECTIVES)}")
        require(is_positive(self.beta), "objective.beta", self.beta, "positive")
        gamma_ok = math.isfinite(self.gamma) and self.gamma >= 0
        require(gamma_ok, "objective.gamma", self.gamma, "zero or positive")
        require(self.loss_type in ("sigmoid", "ipo"), "objective.loss_type", self.loss_type, "sigmoid or ipo")
        smoothing_ok = 0 <= self.label_smoothing < 0.5
        require(smoothing_ok, "objective.label_smoothing", self.label_smoothing, "at least 0 and below 0.5")
        most = MAX_LABELS if self.kind == "classification" else 1
        require(1 <= self.num_labels <= most, "objective.num_labels", self.num_labels, f"between 1 and {most}")
        centre = self.center_rewards_coefficient
        centre_ok = math.isfinite(centre) and centre >= 0
        require(centre_ok, "objective.center_rewards_coefficient", centre, "zero or positive")
        for name, weight in (("desirable", self.desirable_weight), ("undesirable", self.undesirable_weight)):
            require(is_positive(weight), f"objective.{name}_weight", weight, "positive")
        self._require_own_numbers()

    def _require_own_numbers(self) -> None:
        is_ipo = self.kind == "dpo" and self.loss_type == "ipo"
        reader = "ipo" if is_ipo else self.kind
        smooths = self.kind in ("supervised", "dpo") and not is_ipo
        for name, value, usual, is_own in (
            ("gamma", self.gamma, 0, self.kind == "simpo"),
            ("loss_type", self.loss_type, "sigmoid", self.kind == "dpo"),
            ("label_smoothing", self.label_smoothing, 0, smooths),
            ("center_rewards_coefficient", self.center_rewards_coefficient, 0, self.kind == "reward"),
            ("desirable_weight", self.desirable_weight, 1, self.kind == "kto"),
            ("undesirable_weight", self.undesirable_weight, 1, self.kind == "kto"),
        ):
            require(is_own or value == usual, f"objective.{name}", value, f"left out: {reader} doesn't read it")

    @property
    def token_smoothing(self) -> float:
        """Of the cross-entropy of a label."""
        return self.label_smoothing if self.kind == "supervised" else 0.0

    @property
    def is_preference(self) -> bool:
        return self.kind not in ("supervised", "classification")

    @property
    def grades_sequences(self) -> bool:
        """Whether a head of the job's own scores whole sequences, and no token is a label."""
        return self.kind in ("classification", "reward")

    @property
    def rows_per_example(self) -> int:
        """A pair is two rows of the data, chosen before rejected, and is never parted."""
        return 2 if self.is_preference and self.kind != "kto" else 1

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the base model, which is computed in the same tick."""
        return self.kind in ("dpo", "kto")

    @property
    def needs_reference_point(self) -> bool:
        """Whether the answers of a batch are first put to each other's prompts (lora_core/data/kto_pairs.py)."""
        return self.kind == "kto"


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyStoppingConfig:
    """End after `patience` evaluations in a row in which the held-out loss fell by no more than `min_delta` (nats)
    below the one that last did, or the first one. That of step 0, the base's own or the parent's, doesn't count."""

    patience: int
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        require(self.patience >= 1, "early_stopping.patience", self.patience, "at least 1")
        delta_ok = math.isfinite(self.min_delta) and self.min_delta >= 0
        require(delta_ok, "early_stopping.min_delta", self.min_delta, "zero or positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig:
    """Everything that decides a job's result, besides its data and the base model.

    `batch_size` counts sequences per optimizer step, or pairs of them where the objective is one over pairs; of KTO it
    is 2 at least, since each answer is put to another's prompt.
    `slice_tokens` bounds the tokens of one slice; a longer single sequence or pair is a slice of its own. With a
    held-out set the job is always evaluated at step 0 and at the end, and every `evaluate_every_steps` between.
    `keep`: whose weights the job ends with, the last step's, or those of the evaluation after step 0 that had the
    lowest loss (the first of equals). For that, and to stop early, `evaluate_every_steps` is no more than `num_steps`.
    `neftune_alpha`: of the noise on input embeddings in training; 0 is none, and answers that are compared have none.
    The schedule may be longer than the job, but no shorter.
    """

    lora: LoraConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    batch_size: int
    num_steps: int
    seed: int
    evaluate_every_steps: int | None = None
    slice_tokens: int = 1024
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    early_stopping: EarlyStoppingConfig | None = None
    keep: Literal["last", "best"] = "last"
    neftune_alpha: float = 0.0

    def __post_init__(self) -> None:
        fewest = 2 if self.objective.needs_reference_point else 1
        require(self.batch_size >= fewest, "batch_size", self.batch_size, f"at least {fewest}")
        require(self.num_steps >= 1, "num_steps", self.num_steps, "at least 1")
        require(0 <= self.seed < 2**63, "seed", self.seed, "between 0 and 2^63 - 1")
        every = self.evaluate_every_steps
        require(every is None or every >= 1, "evaluate_every_steps", every, "at least 1, or none")
        require(self.slice_tokens >= 1, "slice_tokens", self.slice_tokens, "at least 1")
        alpha_ok = math.isfinite(self.neftune_alpha) and self.neftune_alpha >= 0
        require(alpha_ok, "neftune_alpha", self.neftune_alpha, "zero or positive")
        noise_ok = self.neftune_alpha == 0 or not self.objective.is_preference
        require(noise_ok, "neftune_alpha", self.neftune_alpha, f"left out: {self.objective.kind} compares answers")
        planned, expected = self.schedule.num_steps, f"at least num_steps, {self.num_steps}: past it the rate is 0"
        require(planned >= self.num_steps, "schedule.num_steps", planned, expected)
        require(self.keep in ("last", "best"), "keep", self.keep, "last or best")
        in_time = every is not None and every <= self.num_steps
        expected = f"between 1 and num_steps, {self.num_steps}: else neither early_stopping nor keep 'best' can act"
        require(in_time or not self.needs_evaluation, "evaluate_every_steps", every, expected)

    @property
    def needs_evaluation(self) -> bool:
        """Whether the result depends on a held-out set, without which the job can't be trained."""
        return self.early_stopping is not None or self.keep == "best"

    def digest(self) -> str:
        """sha256 of the canonical JSON (16 and 16.0 are one number): a checkpoint names what it continues."""
        canonical = json.dumps(_canonical(asdict(self)), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def _canonical(value: object) -> object:
    if isinstance(value, dict):
        fields = cast(dict[str, object], value)
        return {name: _canonical(field) for name, field in fields.items()}
    if isinstance(value, tuple):
        return [_canonical(entry) for entry in cast(tuple[object, ...], value)]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def require(condition: bool, field: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{field} is {value!r}.", remedy=f"{field} must be {expected}.")
