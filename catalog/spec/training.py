"""What a person may ask for about the course of training: optimizer, learning rate, evaluations, an early end.

Like lora.py a part of spec.py: requests, and the same with every number known.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from catalog.spec.strict import Auto, PositiveFloat, Strict

BASE_LEARNING_RATE = 2e-4
"""What a learning_rate_multiplier multiplies: the usual rate for LoRA with AdamW."""
HIGHEST_RATE = 1.0
MAX_EVERY_STEPS = 1_000_000
DEFAULT_DECAY_RATIO = 0.2
"""Of wsd: where arXiv 2405.18392 finds it as good as a cosine."""

OptimizerType = Literal["adamw", "sgd", "adafactor"]
OWN_NUMBERS: dict[OptimizerType, tuple[str, ...]] = {
    "adamw": ("beta1", "beta2", "eps"),
    "sgd": ("momentum",),
    "adafactor": ("beta2_decay", "clip_threshold", "scale_floor"),
}
"""Of each type, what no other reads."""
ScheduleType = Literal["constant", "linear", "cosine", "wsd"]
Keep = Literal["last", "best"]


class OptimizerRequest(Strict):
    """AdamW (arXiv 1711.05101), or SGD with momentum or Adafactor (arXiv 1804.04235) as torch has them."""

    type: OptimizerType = Field(default="adamw", description="Optimizer.")
    learning_rate: Annotated[float, Field(gt=0, le=HIGHEST_RATE, allow_inf_nan=False)] | Auto = Field(
        default="auto",
        description=(
            f"Peak rate. auto: {BASE_LEARNING_RATE} times learning_rate_multiplier; sgd and adafactor need one of them."
        ),
    )
    lora_plus_ratio: PositiveFloat = Field(
        default=1.0, description="Rate of B, and of DoRA's magnitudes, over that of A (LoRA+, arXiv 2402.12354)."
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Of adamw.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Of adamw.")
    eps: float = Field(default=1e-8, ge=1e-37, le=1e37, description="Of adamw; what fp32 holds with all its digits.")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="Of sgd.")
    beta2_decay: float = Field(
        default=-0.8, ge=-10, le=0, description="Of adafactor: step s gives its squares the weight s^beta2_decay."
    )
    clip_threshold: float = Field(
        default=1.0, ge=1, le=1e6, description="Of adafactor: an update is held to this root mean square (torch's d)."
    )
    scale_floor: PositiveFloat = Field(
        default=1e-3,
        description=(
            "Of adafactor: the root mean square that a matrix is taken to have at least (torch's epsilon2). B begins "
            "at zero, and moves by no more than the rate times this until it has grown."
        ),
    )
    weight_decay: float = Field(
        default=0.0, ge=0, le=1, description="Of sgd a part of the gradient, of the others apart from it."
    )
    max_grad_norm: PositiveFloat | None = Field(
        default=1.0, description="Clip the job's gradient to this norm; null: never."
    )

    @model_validator(mode="after")
    def _numbers_of_its_own(self) -> OptimizerRequest:
        for owner, names in OWN_NUMBERS.items():
            for name in names if owner != self.type else ():
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{self.type} has no {name}: leave it out, or choose type '{owner}'")
        return self


class ScheduleRequest(Strict):
    """The learning rate over the steps of the job."""

    type: ScheduleType = Field(
        default="cosine", description="wsd: warm-up, then the peak rate, then a line to zero (arXiv 2405.18392)."
    )
    warmup_ratio: float = Field(
        default=0.03,
        ge=0,
        lt=1,
        description=(
            "Part of all n steps in which the rate rises. w = min(⌈ratio·n⌉, n - 1) steps warm up, and step s of them "
            "has s/(w + 1) of the peak rate."
        ),
    )
    decay_ratio: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description=(
            f"Of wsd: part of all n steps in which the rate goes down, ⌈ratio·n⌉ of them. null: {DEFAULT_DECAY_RATIO}."
        ),
    )

    @model_validator(mode="after")
    def _decay_of_wsd(self) -> ScheduleRequest:
        if self.decay_ratio is not None and self.type != "wsd":
            raise ValueError(f"{self.type} has no decay_ratio: leave it out, or choose type 'wsd'")
        if self.type == "wsd" and self.warmup_ratio + (self.decay_ratio or DEFAULT_DECAY_RATIO) > 1:
            raise ValueError("warmup_ratio and decay_ratio must not exceed 1 together")
        return self


class EvaluationRequest(Strict):
    """When the validation file is read, and what follows. It always is at the start (the base's loss) and the end."""

    every_steps: Annotated[int, Field(json_schema_extra={"minimum": 1, "maximum": MAX_EVERY_STEPS})] | Auto = Field(
        default="auto", description="auto: ten times over the job."
    )
    keep: Keep | Auto = Field(
        default="auto",
        description=(
            "Whose weights become the adapter: the last step's, or those of the evaluation with the lowest held-out "
            "loss. auto: best with early_stopping, else last."
        ),
    )

    samples: Samples | None = Field(default=None, description="Prompts to answer at each evaluation.")

    @field_validator("every_steps")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 1 <= value <= MAX_EVERY_STEPS:
            raise ValueError(f"must be between 1 and {MAX_EVERY_STEPS}, or 'auto'")
        return value


class EarlyStopping(Strict):
    """The job succeeds before its last step, where the held-out loss has stopped falling."""

    patience: int = Field(ge=1, le=1000, description="Evaluations in a row without a fall, after which it ends.")
    min_delta: float = Field(default=0.0, ge=0, le=1e6, description="What counts as a fall is more than this, in nats.")


class OptimizerSpec(Strict):
    type: OptimizerType = "adamw"
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    max_grad_norm: float | None
    lora_plus_ratio: float = 1.0
    momentum: float = 0.0
    beta2_decay: float = -0.8
    clip_threshold: float = 1.0
    scale_floor: float = 1e-3


class ScheduleSpec(Strict):
    type: ScheduleType
    warmup_ratio: float
    decay_ratio: float | None = None
    """None where the type has none."""


def resolve_optimizer(request: OptimizerRequest, *, learning_rate: float) -> OptimizerSpec:
    return OptimizerSpec(**request.model_dump(exclude={"learning_rate"}), learning_rate=learning_rate)


def resolve_schedule(request: ScheduleRequest) -> ScheduleSpec:
    decay = (request.decay_ratio or DEFAULT_DECAY_RATIO) if request.type == "wsd" else None
    return ScheduleSpec(type=request.type, warmup_ratio=request.warmup_ratio, decay_ratio=decay)


def resolve_keep(evaluation: EvaluationRequest, early_stopping: EarlyStopping | None) -> Keep:
    if evaluation.keep != "auto":
        return evaluation.keep
    return "last" if early_stopping is None else "best"


MAX_PROMPTS = 8
MAX_PROMPT_CHARS = 2000
MAX_ANSWER_TOKENS = 128

Prompt = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT_CHARS, pattern=r"\S")]


class Samples(Strict):
    """Greedy answers: the likeliest token, time and again. Training is not changed by them."""

    prompts: Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS)] = Field(
        description="As a user's turn where the training rows are chats, else as text that goes on."
    )
    max_tokens: Annotated[int, Field(ge=1, le=MAX_ANSWER_TOKENS)] = Field(default=64, description="Of one answer.")
