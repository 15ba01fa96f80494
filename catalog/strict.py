"""What every part of a request and of a spec is made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]
PositiveFloat = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


class Strict(BaseModel):
    """Unknown fields are refused, and no value is coerced, save that a whole number may stand for any number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
