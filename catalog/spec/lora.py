"""The adapter's shape as a person may ask for it (`LoraRequest`), and as it comes to (`LoraSpec`).

Patterns are objects, as in PEFT, but the keys of a JSON object have no order: submission refuses two keys
that give one layer different values (target_modules.py), so the order never matters.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import regex
from pydantic import AfterValidator, Field, StringConstraints, field_validator, model_validator
from pydantic.config import JsonDict

from catalog import write_guard
from catalog.spec.strict import Auto, PositiveFloat, Strict

MAX_RANK = 256
REGEX_PREFIX = "re:"
MAX_PATTERN_CHARS = 256
MAX_MODULES = 64
MAX_LAYERS = 1024
MAX_KEYS = 32
"""Of one pattern: each is tried on each linear layer of a base."""


def _expression(text: str) -> str:
    """Counted repetition is refused: a nested one takes gigabytes to compile."""
    write_guard.check_outside("compiling a pattern")
    if "{" in text:
        raise ValueError("must be a regular expression without counted repetition, '{…}'")
    try:
        regex.compile(text)
        re.compile(text)
    except (regex.error, re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"must be a regular expression; this is none ({error})") from error
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
"""Limits that are checked with words of their own, as the OpenAPI document tells them."""


class LoraRequest(Strict):
    """The adapter's shape."""

    rank: int = Field(default=16, ge=1, le=MAX_RANK, description="Rank r of B·A.")
    alpha: PositiveFloat | Auto = Field(default="auto", description="The update is scaled by alpha/rank. auto: 2·rank.")
    dropout: float = Field(default=0.0, ge=0, le=0.9, description="Probability of dropping an input of A.")
    target_modules: Literal["all-linear"] | TargetExpression | Modules = Field(
        default="all-linear",
        description=(
            "Names of the linear layers to adapt, 're:' and a regular expression of their whole paths, or all but the "
            "output head."
        ),
    )
    layers_to_transform: Layers | None = Field(
        default=None, description="Only in the blocks of these numbers, from 0; null: in all."
    )
    rank_pattern: dict[PatternKey, Annotated[int, Field(ge=1, le=MAX_RANK)]] = Field(
        default={},
        description="Other ranks by layer: a path's end, or a regular expression for it, and the rank.",
        json_schema_extra=_FEW_KEYS,
    )
    alpha_pattern: dict[PatternKey, PositiveFloat] = Field(
        default={}, description="Other alphas, in the same way.", json_schema_extra=_FEW_KEYS
    )
    use_rslora: bool = Field(default=False, description="Scale by alpha/sqrt(rank) (arXiv 2312.03732).")
    use_dora: bool = Field(
        default=False, description="Learn the length of each output's weights beside A and B (arXiv 2402.09353)."
    )
    init_lora_weights: InitialWeights = Field(
        default="default",
        description=(
            "Where A and B begin: default (Kaiming-uniform A, B of zeros), gaussian, pissa (arXiv 2404.02948), "
            "pissa_niter_N, or olora (arXiv 2406.01775)."
        ),
    )

    @field_validator("target_modules")
    @classmethod
    def _some_targets(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, list) and not 1 <= len(value) <= MAX_MODULES:
            raise ValueError(f"name between 1 and {MAX_MODULES} modules, or say 'all-linear'")
        return value

    @field_validator("layers_to_transform")
    @classmethod
    def _some_layers(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and not 1 <= len(value) <= MAX_LAYERS:
            raise ValueError(f"must be between 1 and {MAX_LAYERS} numbers of blocks, or null")
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
            raise ValueError("say the layers in the regular expression of target_modules, not in layers_to_transform")
        return self


class LoraSpec(Strict):
    """Every default resolved. Fields with a default were added later, and the default is what was done before."""

    rank: int
    alpha: float
    dropout: float
    target_modules: str | list[str]
    use_rslora: bool
    layers_to_transform: list[int] | None = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    use_dora: bool = False
    init_lora_weights: str = "default"

    @property
    def begins_with_the_base(self) -> bool:
        """Whether A and B begin with a part of each weight, which is then subtracted from the base model."""
        return begins_with_the_base(self.init_lora_weights)

    @property
    def target_expression(self) -> str | None:
        """The regular expression of `target_modules`; None where those are names."""
        wanted = self.target_modules
        if not isinstance(wanted, str) or not wanted.startswith(REGEX_PREFIX):
            return None
        return wanted.removeprefix(REGEX_PREFIX)


def begins_with_the_base(init_lora_weights: str | None) -> bool:
    """None: a spec of before there was a choice."""
    return init_lora_weights not in (None, "default", "gaussian")


def resolve_lora(lora: LoraRequest) -> LoraSpec:
    layers = lora.layers_to_transform
    return LoraSpec(
        **lora.model_dump(exclude={"alpha", "layers_to_transform"}),
        alpha=2.0 * lora.rank if lora.alpha == "auto" else lora.alpha,
        layers_to_transform=None if layers is None else sorted(set(layers)),
    )
