"""What every part of a request and of a spec is made of."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Auto = Literal["auto"]
PositiveFloat = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
WITHOUT_NUL: dict[str, Any] = {"pattern": r"^[^\x00]*$"}
"""For the OpenAPI document, of a text that names something: a database may not take one that has a NUL."""
LABEL_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""A name that a person chooses: of a base model, a project, an organization, or part of an adapter's name."""
LABEL = re.compile(LABEL_PATTERN.replace("$", r"\Z"))
Label = Annotated[str, StringConstraints(pattern=LABEL_PATTERN)]
EXACT = 2**53
"""Below it a float holds every whole number."""


class Strict(BaseModel):
    """Unknown fields are refused, and no value is coerced, save that a whole number may stand for any number, and 3.0
    for 3, which JSON does not tell apart."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers(cls, given: Any) -> Any:
        return _whole(given) if isinstance(given, dict) else given


def _whole(value: Any) -> Any:
    """Floats without a fraction as integers; a field that takes any number makes floats of them again."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < EXACT else value
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [_whole(item) for item in cast(list[Any], value)]
    return value
