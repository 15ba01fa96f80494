# pyright: strict
"""Configuration of a job, validated on construction. Does not import torch, so the API server can import it cheaply."""

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
"""Upper limit of dropout. Kept values are scaled by 1 / (1 - dropout), so above it a step is mostly noise."""
Kind = Literal["train", "evaluate"]
"""Kind of a slice: part of an optimizer step or of an evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """LoRA: y = W x + scale·B A x, with scale = alpha / rank, or alpha / √rank with `use_rslora` (arXiv 2312.03732).

    Attributes:
        target_modules: "all-linear", one name or several. As in PEFT, a name matches a module path that equals it or
            ends with it after a dot. "re:PATTERN" is a regular expression over the whole path.
        layers_to_transform: Numbers of the blocks to adapt, from 0. None adapts all blocks.
        rank_pattern: (key, rank) pairs. A key is a regular expression that matches a whole module path or its end
            after a dot. The first matching key replaces `rank`.
        alpha_pattern: (key, alpha) pairs, matched like `rank_pattern`.
        use_dora: Train a magnitude for each output as well (lora_core/adapter/dora.py).
        modules_to_save: Modules that are trained in full (lora_core/adapter/modules_to_save.py).
        trainable_token_indices: Ids of the tokens whose embeddings are trained.
        init_lora_weights: Initial A and B (lora_core/adapter/initialization.py): "default" (True in PEFT),
            "gaussian", "pissa", "olora", or "pissa_niter_N": PiSSA by a randomized SVD with N iterations.

    Raises:
        ConfigError: A value is out of range.
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
        require(ranks_ok, "lora.rank_pattern", self.rank_pattern, f"pairs of module name and rank (1 to {MAX_RANK})")
        init_ok = INIT.fullmatch(self.init_lora_weights) is not None
        expected = "default, gaussian, pissa, pissa_niter_N with N from 1 to 99, or olora"
        require(init_ok, "lora.init_lora_weights", self.init_lora_weights, expected)
        alphas_ok = all(compiles(key) and is_positive(alpha) for key, alpha in self.alpha_pattern)
        require(alphas_ok, "lora.alpha_pattern", self.alpha_pattern, "pairs of module name and positive number")
        saved, tokens = self.modules_to_save, self.trainable_token_indices
        require(all(saved) and len(set(saved)) == len(saved), "lora.modules_to_save", saved, "distinct module names")
        tokens_ok = all(token >= 0 for token in tokens) and len(set(tokens)) == len(tokens)
        require(tokens_ok, "lora.trainable_token_indices", tokens, "distinct token IDs of at least 0")

    def _require_targets(self) -> None:
        names = (self.target_modules,) if isinstance(self.target_modules, str) else self.target_modules
        named = bool(names) and all(name and name.strip() == name for name in names)
        require(named, "lora.target_modules", self.target_modules, "'all-linear' or module names")
        pattern = self.target_pattern
        pattern_ok = pattern is None or (pattern != "" and compiles(pattern))
        require(pattern_ok, "lora.target_modules", self.target_modules, "a regular expression after 're:'")
        layers = self.layers_to_transform
        layers_ok = layers is None or (len(layers) > 0 and min(layers) >= 0 and pattern is None)
        expected = "block numbers of at least 0, or none; it can't be combined with a regular expression"
        require(layers_ok, "lora.layers_to_transform", layers, expected)

    @property
    def target_pattern(self) -> str | None:
        """The regular expression in `target_modules`, or None if it contains names."""
        wanted = self.target_modules
        if not isinstance(wanted, str) or not wanted.startswith(REGEX_PREFIX):
            return None
        return wanted.removeprefix(REGEX_PREFIX)

    @property
    def subtracts_start(self) -> bool:
        """Whether the initial A and B are a nonzero update, which is subtracted from the base model."""
        return self.init_lora_weights not in ("default", "gaussian")

    @property
    def pissa_iterations(self) -> int | None:
        """Number of iterations of the randomized SVD. None for the exact SVD."""
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
"""Range in which fp32 has full precision. A smaller `eps` rounds to 0 in fp32, and 0 / 0 is NaN."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101), SGD or Adafactor (arXiv 1804.04235).

    Modules trained in full (heads including their biases, token embeddings) use the learning rate of A. PEFT trains
    the biases of heads with the learning rate of B instead.

    Attributes:
        lora_plus_ratio: Learning rate of B and of DoRA's magnitudes, divided by that of A (LoRA+, arXiv 2402.12354).
        beta1, beta2, eps: Used by AdamW only.
        weight_decay: Decoupled from the gradient, except with SGD, which adds it to the gradient as in torch.
        max_grad_norm: Maximum Euclidean norm of a job's gradient. None disables clipping.
        momentum: Used by SGD only.
        beta2_decay: Used by Adafactor only. The squared gradients of step s get the weight s^`beta2_decay`.
        clip_threshold: Used by Adafactor only. Maximum root mean square of an update, before it is scaled by the
            learning rate (`d` in torch.optim.Adafactor).
        scale_floor: Used by Adafactor only. A matrix moves by at most min(`learning_rate`, 1 / √step) times its own
            root mean square, for which `scale_floor` is the minimum (epsilon2 in torch). It matters because B is
            initialized to zero.

    Raises:
        ConfigError: A value is out of range, or is set for an optimizer that does not use it.
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
            require(number_ok, f"optimizer.{name}", value, f"{expected}, and omitted unless kind is adafactor")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate schedule: linear warm-up, then constant, linear decay, cosine decay or "wsd".

    During the warm-up of w = `warmup_steps` steps, step s (from 1) has the learning rate peak · s / (w + 1). No step
    has a learning rate of 0, and step w + 1 has the peak. "linear" and "cosine" decay to 0 at `num_steps`. "wsd"
    (warm-up, stable, decay: arXiv 2404.06395, 2405.18392) keeps the peak until the last `decay_steps` steps. Then it
    decays linearly, and would reach 0 one step after the last one.

    Raises:
        ConfigError: A value is out of range.
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
    """Loss that a job minimizes: the cross-entropy of its labels, or a preference loss (losses/preference.py).

    Attributes:
        kind: "dpo", "orpo" and "simpo" compare pairs of answers; "kto" takes single answers. "classification" and
            "reward" need a base model with a sequence head (lora_core/forward/classification.py).
        beta: Strength of the preference reward (λ in the ORPO paper).
        gamma: Target reward margin of SimPO.
        loss_type: Loss of DPO.
        label_smoothing: With DPO, the assumed fraction of swapped pairs. With "supervised", the parameter of
            torch.nn.CrossEntropyLoss, in training only: validation losses are plain cross-entropies.
        num_labels: Number of classes of "classification". 1 means regression.
        center_rewards_coefficient: Strength of the term that keeps rewards near 0. Used by "reward" only.
        desirable_weight, undesirable_weight: Loss weights of the two kinds of answers. Used by KTO only.

    Raises:
        ConfigError: A value is out of range, or is set for a `kind` that does not use it.
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
        supports_smoothing = self.kind in ("supervised", "dpo") and not is_ipo
        for name, value, usual, is_own in (
            ("gamma", self.gamma, 0, self.kind == "simpo"),
            ("loss_type", self.loss_type, "sigmoid", self.kind == "dpo"),
            ("label_smoothing", self.label_smoothing, 0, supports_smoothing),
            ("center_rewards_coefficient", self.center_rewards_coefficient, 0, self.kind == "reward"),
            ("desirable_weight", self.desirable_weight, 1, self.kind == "kto"),
            ("undesirable_weight", self.undesirable_weight, 1, self.kind == "kto"),
        ):
            require(is_own or value == usual, f"objective.{name}", value, f"omitted: {reader} does not use it")

    @property
    def token_smoothing(self) -> float:
        """Label smoothing of the token cross-entropy."""
        return self.label_smoothing if self.kind == "supervised" else 0.0

    @property
    def is_preference(self) -> bool:
        return self.kind not in ("supervised", "classification")

    @property
    def grades_sequences(self) -> bool:
        """Whether the job trains a head that scores whole sequences, so that no token is a label."""
        return self.kind in ("classification", "reward")

    @property
    def rows_per_example(self) -> int:
        """Number of dataset rows per example: 2 for a pair (chosen, then rejected), which is never split."""
        return 2 if self.is_preference and self.kind != "kto" else 1

    @property
    def needs_reference(self) -> bool:
        """Whether the loss needs log-probabilities of the reference model, which the same tick computes."""
        return self.kind in ("dpo", "kto")

    @property
    def needs_reference_point(self) -> bool:
        """Whether each batch starts with a pass over mismatched prompts and answers (lora_core/data/kto_pairs.py)."""
        return self.kind == "kto"


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyStoppingConfig:
    """Stop a job after `patience` consecutive evaluations without improvement.

    An evaluation improves if its validation loss is more than `min_delta` nats below that of the last improving
    evaluation, or of the first one. The evaluation at step 0, of the base model or the parent, doesn't count.
    """

    patience: int
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        require(self.patience >= 1, "early_stopping.patience", self.patience, "at least 1")
        delta_ok = math.isfinite(self.min_delta) and self.min_delta >= 0
        require(delta_ok, "early_stopping.min_delta", self.min_delta, "zero or positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig:
    """Everything that determines a job's result, except its data and the base model.

    Attributes:
        schedule: May be longer than `num_steps`, but not shorter.
        batch_size: Sequences per optimizer step, or pairs of sequences for a pairwise objective. At least 2 for KTO,
            which combines each answer with the prompt of another one.
        evaluate_every_steps: Steps between evaluations. A job with a validation set is also evaluated at step 0 and
            at the end. At most `num_steps` if `early_stopping` or `keep` "best" is set.
        slice_tokens: Maximum tokens of one slice (micro-batch). A longer single sequence or pair is its own slice.
        keep: Weights to keep: those of the last step, or those of the evaluation after step 0 with the lowest
            loss (the earliest one on a tie).
        neftune_alpha: Scale of the noise on input embeddings during training (NEFTune, arXiv 2310.05914). 0 disables
            it. Preference objectives don't support it.

    Raises:
        ConfigError: A value is out of range, or two values contradict each other.
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
        require(noise_ok, "neftune_alpha", self.neftune_alpha, f"omitted: {self.objective.kind} does not support it")
        planned, expected = self.schedule.num_steps, f"at least num_steps ({self.num_steps}): the rate is 0 after it"
        require(planned >= self.num_steps, "schedule.num_steps", planned, expected)
        require(self.keep in ("last", "best"), "keep", self.keep, "last or best")
        in_time = every is not None and every <= self.num_steps
        expected = f"between 1 and num_steps ({self.num_steps}), because of early_stopping or keep 'best'"
        require(in_time or not self.needs_evaluation, "evaluate_every_steps", every, expected)

    @property
    def needs_evaluation(self) -> bool:
        """Whether the result depends on a validation set, so that the job can't be trained without one."""
        return self.early_stopping is not None or self.keep == "best"

    def digest(self) -> str:
        """Return the sha256 of the canonical JSON, in which 16 and 16.0 are equal. Checkpoints store it."""
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
        raise ConfigError(f"{field} is {value!r}, but must be {expected}.", remedy=f"Correct {field}.")
