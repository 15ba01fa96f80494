"""Options for training: optimizer, learning rate schedule, evaluations and early stopping.

Each part has a request model, and a spec model with all values resolved.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints, field_validator, model_validator

from catalog.spec.model_fields import Auto, PositiveFloat, Strict, resolved

BASE_LEARNING_RATE = 2e-4
"""Default learning rate, which learning_rate_multiplier multiplies: the usual learning rate for LoRA with AdamW."""
HIGHEST_RATE = 1.0
MAX_EVERY_STEPS = 1_000_000
DEFAULT_DECAY_RATIO = 0.2
"""Default of decay_ratio: with it, arXiv 2405.18392 finds wsd as good as cosine."""

OptimizerType = Literal["adamw", "sgd", "adafactor"]
OWN_NUMBERS: dict[OptimizerType, tuple[str, ...]] = {
    "adamw": ("beta1", "beta2", "eps"),
    "sgd": ("momentum",),
    "adafactor": ("beta2_decay", "clip_threshold", "scale_floor"),
}
"""Fields that only one optimizer type uses."""
ScheduleType = Literal["constant", "linear", "cosine", "wsd"]
Keep = Literal["last", "best"]


class OptimizerRequest(Strict):
    """AdamW (arXiv 1711.05101), SGD with momentum, or Adafactor (arXiv 1804.04235), as implemented by torch."""

    type: OptimizerType = Field(default="adamw", description="Optimization algorithm of the job.")
    learning_rate: Annotated[float, Field(gt=0, le=HIGHEST_RATE, allow_inf_nan=False)] | Auto = Field(
        default="auto",
        description=(
            f"Peak learning rate. auto: {BASE_LEARNING_RATE} times learning_rate_multiplier. sgd and adafactor require "
            "one of the two fields."
        ),
    )
    lora_plus_ratio: PositiveFloat = Field(
        default=1.0,
        description="LoRA+: learning rate of B and of DoRA's magnitudes, divided by that of A (arXiv 2402.12354).",
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the first moment (adamw only).")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of the second moment (adamw only).")
    eps: float = Field(default=1e-8, ge=1e-37, le=1e37, description="Added to the denominator (adamw only).")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="Momentum (sgd only).")
    beta2_decay: float = Field(
        default=-0.8,
        ge=-10,
        le=0,
        description="Step s weights its squared gradients by s^beta2_decay (adafactor only).",
    )
    clip_threshold: float = Field(
        default=1.0, ge=1, le=1e6, description="Maximum root mean square of an update (adafactor only; d in torch)."
    )
    scale_floor: PositiveFloat = Field(
        default=1e-3,
        description=(
            "Lower bound for the root mean square of a matrix (adafactor only; epsilon2 in torch). B starts at zero; "
            "until it has grown, a step changes it by at most the learning rate times this value."
        ),
    )
    weight_decay: float = Field(
        default=0.0, ge=0, le=1, description="Weight decay: added to the gradient for sgd, decoupled for the others."
    )
    max_grad_norm: PositiveFloat | None = Field(
        default=1.0, description="Clip the gradient of the job to this norm. null: no clipping."
    )

    @model_validator(mode="after")
    def _numbers_of_its_own(self) -> OptimizerRequest:
        for owner, names in OWN_NUMBERS.items():
            for name in names if owner != self.type else ():
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{self.type} has no {name}: remove it, or set type to '{owner}'")
        return self


class ScheduleRequest(Strict):
    """The learning rate schedule over the steps of the job."""

    type: ScheduleType = Field(
        default="cosine",
        description="Curve of the learning rate. wsd: warm-up, peak learning rate, linear decay to zero (arXiv "
        "2405.18392).",
    )
    warmup_ratio: float = Field(
        default=0.03,
        ge=0,
        lt=1,
        description=(
            "Fraction of all n steps for warm-up. The first w = min(⌈ratio·n⌉, n - 1) steps warm up: step s uses "
            "s/(w + 1) of the peak learning rate."
        ),
    )
    decay_ratio: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description=(
            f"Fraction of all n steps for the decay, which are ⌈ratio·n⌉ steps (wsd only). null: {DEFAULT_DECAY_RATIO}."
        ),
    )

    @model_validator(mode="after")
    def _decay_of_wsd(self) -> ScheduleRequest:
        if self.decay_ratio is not None and self.type != "wsd":
            raise ValueError(f"{self.type} has no decay_ratio: remove it, or set type to 'wsd'")
        if self.type == "wsd" and self.warmup_ratio + (self.decay_ratio or DEFAULT_DECAY_RATIO) > 1:
            raise ValueError("the sum of warmup_ratio and decay_ratio must not exceed 1")
        return self


class EvaluationRequest(Strict):
    """Evaluations on the validation file. A job is always evaluated before its first step and at its end."""

    every_steps: Annotated[int, Field(json_schema_extra={"minimum": 1, "maximum": MAX_EVERY_STEPS})] | Auto = Field(
        default="auto", description="Optimizer steps between evaluations. auto: ten evaluations over the job."
    )
    keep: Keep | Auto = Field(
        default="auto",
        description=(
            "Weights that become the adapter. last: those of the last step. best: those of the evaluation with the "
            "lowest validation loss. auto: best with early_stopping, else last."
        ),
    )

    samples: Samples | None = Field(
        default=None, description="Prompts that are answered at each evaluation, in events as data.samples. null: none."
    )

    @field_validator("every_steps")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 1 <= value <= MAX_EVERY_STEPS:
            raise ValueError(f"must be between 1 and {MAX_EVERY_STEPS}, or 'auto'")
        return value


class EarlyStopping(Strict):
    """Early stopping: the job succeeds before its last step if the validation loss no longer improves."""

    patience: int = Field(
        ge=1, le=1000, description="Consecutive evaluations without improvement before the job stops."
    )
    min_delta: float = Field(
        default=0.0, ge=0, le=1e6, description="An improvement lowers the validation loss by more than this, in nats."
    )


class OptimizerSpec(OptimizerRequest):
    """The optimizer, with every `auto` resolved."""

    model_config = ConfigDict(json_schema_extra=resolved)
    learning_rate: float = Field()  # pyright: ignore[reportIncompatibleVariableOverride]


class ScheduleSpec(ScheduleRequest):
    """The learning rate schedule."""

    model_config = ConfigDict(json_schema_extra=resolved)
    decay_ratio: float | None = Field(
        default=None, description="Fraction of all n steps for the decay. null: the schedule has no decay phase."
    )


class EvaluationSpec(EvaluationRequest):
    """The evaluations on the validation file."""

    model_config = ConfigDict(json_schema_extra=resolved)
    every_steps: int | None = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, description="Optimizer steps between evaluations. null: ten evaluations over the job."
    )
    keep: Keep = Field(default="last")  # pyright: ignore[reportIncompatibleVariableOverride]


def resolve_optimizer(request: OptimizerRequest, *, learning_rate: float) -> OptimizerSpec:
    return OptimizerSpec(**request.model_dump(exclude={"learning_rate"}), learning_rate=learning_rate)


def resolve_schedule(request: ScheduleRequest) -> ScheduleSpec:
    decay = (request.decay_ratio or DEFAULT_DECAY_RATIO) if request.type == "wsd" else None
    return ScheduleSpec(type=request.type, warmup_ratio=request.warmup_ratio, decay_ratio=decay)


def resolve_evaluation(request: EvaluationRequest, early_stopping: EarlyStopping | None) -> EvaluationSpec:
    by_stopping: Keep = "last" if early_stopping is None else "best"
    return EvaluationSpec(
        every_steps=None if request.every_steps == "auto" else request.every_steps,
        keep=by_stopping if request.keep == "auto" else request.keep,
        samples=request.samples,
    )


MAX_PROMPTS = 8
MAX_PROMPT_CHARS = 2000
MAX_ANSWER_TOKENS = 128

Prompt = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT_CHARS, pattern=r"\S")]


class Samples(Strict):
    """Prompts that are answered by greedy decoding. They do not affect training."""

    prompts: Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS)] = Field(
        description="A prompt is a user message if the training rows are chats, else a text to continue."
    )
    max_tokens: Annotated[int, Field(ge=1, le=MAX_ANSWER_TOKENS)] = Field(
        default=64, description="Maximum tokens of an answer."
    )
