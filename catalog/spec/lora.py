"""The adapter configuration as requested (`LoraRequest`) and with all defaults resolved (`LoraSpec`).

Patterns are objects, as in PEFT, but the keys of a JSON object have no order. Admission rejects two keys that set
different values for one layer (target_modules.py), so the order never matters.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import regex
from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, field_validator, model_validator
from pydantic.config import JsonDict

from catalog import write_guard
from catalog.spec.model_fields import Auto, PositiveFloat, Strict, resolved

MAX_RANK = 256
REGEX_PREFIX = "re:"
MAX_PATTERN_CHARS = 256
MAX_MODULES = 64
MAX_LAYERS = 1024
MAX_KEYS = 32
"""Maximum keys of one pattern, because each key is matched with each linear layer of a base model."""


def _expression(text: str) -> str:
    """Validate a regular expression. Counted repetition is rejected, because nested ones take gigabytes to compile."""
    write_guard.check_outside("compiling a pattern")
    if "{" in text:
        raise ValueError("must be a regular expression without counted repetition ('{…}')")
    try:
        regex.compile(text)
        re.compile(text)
    except (regex.error, re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"must be a valid regular expression ({error})") from error
    return text


def _targets(text: str) -> str:
    _expression(text.removeprefix(REGEX_PREFIX))
    return text


MODULE_PATTERN = r"^[\w.]{1,128}$"
TARGET_PATTERN = r"^re:.{1,256}$"
INITIAL_PATTERN = r"^(default|gaussian|pissa|pissa_niter_[1-9][0-9]?|olora)$"
ModuleName = Annotated[str, StringConstraints(pattern=MODULE_PATTERN)]
TargetExpression = Annotated[str, StringConstraints(pattern=TARGET_PATTERN), AfterValidator(_targets)]
PatternKey = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PATTERN_CHARS), AfterValidator(_expression)]
InitialWeights = Annotated[str, StringConstraints(pattern=INITIAL_PATTERN)]
Layer = Annotated[int, Field(ge=0, le=10_000)]
Modules = Annotated[list[ModuleName], Field(json_schema_extra={"minItems": 1, "maxItems": MAX_MODULES})]
Layers = Annotated[list[Layer], Field(json_schema_extra={"minItems": 1, "maxItems": MAX_LAYERS})]
_FEW_KEYS: JsonDict = {
    "maxProperties": MAX_KEYS,
    "propertyNames": {"minLength": 1, "maxLength": MAX_PATTERN_CHARS, "format": "regex", "pattern": r"^[^{]+$"},
}
"""OpenAPI schema of limits that validators check with their own messages."""


class LoraRequest(Strict):
    """The adapter configuration."""

    rank: int = Field(default=16, ge=1, le=MAX_RANK, description="Rank r of the update B·A.")
    alpha: PositiveFloat | Auto = Field(default="auto", description="Scales the update by alpha/rank. auto: 2·rank.")
    dropout: float = Field(default=0.0, ge=0, le=0.9, description="Dropout probability of the inputs of A.")
    target_modules: Literal["all-linear"] | TargetExpression | Modules = Field(
        default="all-linear",
        description=(
            "Linear layers to adapt: a list of layer names or ends of paths, 're:' and a regular expression that "
            "matches whole paths, or all-linear for all layers except the output head."
        ),
    )
    layers_to_transform: Layers | None = Field(
        default=None, description="Numbers of the blocks to adapt, from 0. null: all blocks."
    )
    rank_pattern: dict[PatternKey, Annotated[int, Field(ge=1, le=MAX_RANK)]] = Field(
        default={},
        description="Ranks of individual layers. The key is a path, the end of a path, or a regular expression.",
        json_schema_extra=_FEW_KEYS,
    )
    alpha_pattern: dict[PatternKey, PositiveFloat] = Field(
        default={}, description="Alphas of individual layers; keys as in rank_pattern.", json_schema_extra=_FEW_KEYS
    )
    use_rslora: bool = Field(
        default=False, description="Rank-stabilized LoRA: scale by alpha/sqrt(rank) (arXiv 2312.03732)."
    )
    use_dora: bool = Field(
        default=False, description="DoRA: also train a magnitude for each output (arXiv 2402.09353)."
    )
    init_lora_weights: InitialWeights = Field(
        default="default",
        description=(
            "Initialization of A and B: default (Kaiming-uniform A, zero B), gaussian, pissa (arXiv 2404.02948), "
            "pissa_niter_N with N from 1 to 99, or olora (arXiv 2406.01775)."
        ),
    )

    @field_validator("target_modules")
    @classmethod
    def _some_targets(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, list) and not 1 <= len(value) <= MAX_MODULES:
            raise ValueError(f"must be a list of 1 to {MAX_MODULES} layer names, or 'all-linear'")
        return value

    @field_validator("layers_to_transform")
    @classmethod
    def _some_layers(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and not 1 <= len(value) <= MAX_LAYERS:
            raise ValueError(f"must be a list of 1 to {MAX_LAYERS} block numbers, or null")
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _few_keys(cls, value: dict[str, float]) -> dict[str, float]:
        if len(value) > MAX_KEYS:
            raise ValueError(f"must have at most {MAX_KEYS} keys")
        return value

    @model_validator(mode="after")
    def _one_choice_of_layers(self) -> LoraRequest:
        if self.layers_to_transform is not None and str(self.target_modules).startswith(REGEX_PREFIX):
            raise ValueError("layers_to_transform can't be combined with a regular expression in target_modules")
        return self


class LoraSpec(LoraRequest):
    """The adapter configuration, with every `auto` resolved."""

    model_config = ConfigDict(json_schema_extra=resolved)
    alpha: float = Field()  # pyright: ignore[reportIncompatibleVariableOverride]
    # The request's expressions are valid. A transaction that writes must not compile them again.
    target_modules: str | list[str] = Field()
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}

    @property
    def begins_with_the_base(self) -> bool:
        """Whether A and B are initialized from the weights, and that part is then subtracted from the base model."""
        return begins_with_the_base(self.init_lora_weights)

    @property
    def target_expression(self) -> str | None:
        """The regular expression of `target_modules`; None if they are names."""
        wanted = self.target_modules
        if not isinstance(wanted, str) or not wanted.startswith(REGEX_PREFIX):
            return None
        return wanted.removeprefix(REGEX_PREFIX)


def begins_with_the_base(init_lora_weights: str | None) -> bool:
    """Return whether A and B are initialized from the base model's weights. None: a spec older than the field."""
    return init_lora_weights not in (None, "default", "gaussian")


def resolve_lora(lora: LoraRequest) -> LoraSpec:
    layers = lora.layers_to_transform
    return LoraSpec(
        **lora.model_dump(exclude={"alpha", "layers_to_transform"}),
        alpha=2.0 * lora.rank if lora.alpha == "auto" else lora.alpha,
        layers_to_transform=None if layers is None else sorted(set(layers)),
    )
