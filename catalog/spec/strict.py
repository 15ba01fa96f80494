"""The base class and common types of requests and specs."""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

Auto = Literal["auto"]
PositiveFloat = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
WITHOUT_NUL: dict[str, Any] = {"pattern": r"^[^\x00]*$"}
"""For the OpenAPI schema of names and ids: PostgreSQL can't store a NUL character."""
LABEL_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Pattern of user-defined names: base models, projects, organizations, and part of an adapter's name."""
LABEL = re.compile(LABEL_PATTERN.replace("$", r"\Z"))
MAX_LABEL_CHARS = 64
Label = Annotated[str, StringConstraints(pattern=LABEL_PATTERN)]
Suffix = Annotated[
    str,
    StringConstraints(min_length=1, max_length=MAX_LABEL_CHARS),
    AfterValidator(lambda text: as_label(text) or None),
]
"""Any text, as in OpenAI's API. None if no character of it can be part of a name."""
LAST_SECOND = 253_402_300_799
"""The last second of the year 9999, as Unix time: the last one that `datetime` represents."""
EXACT = 2**53
"""Floats represent all whole numbers up to this value exactly."""


def as_label(text: str) -> str:
    """Return the text as part of a name: without accents, and with `-` for other characters that a name can't have.

    Returns "" if no letter or digit is left. Some characters become several letters, so the end may be cut off.
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).lstrip("._-")[:MAX_LABEL_CHARS].rstrip("-")


def label_fault(name: str) -> str:
    """Return why `name` does not match LABEL, to end a sentence."""
    if not name:
        return "it is empty"
    if len(name) > MAX_LABEL_CHARS:
        return f"it has {len(name):,} characters, but the maximum is {MAX_LABEL_CHARS}"
    unfit = next((char for char in name if not re.match(r"[A-Za-z0-9._-]", char)), None)
    return f"it starts with {name[0]!r}" if unfit is None else f"it contains {unfit!a}"


class Strict(BaseModel):
    """Base model that rejects unknown fields and coerces no values.

    Exceptions: a whole number is accepted for any number, and 3.0 for 3, because JSON does not distinguish them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    verbatim: ClassVar[frozenset[str]] = frozenset()
    """Fields whose content is kept as it was sent, because a template renders 3.0 and 3 differently."""

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        fields = cast(dict[str, Any], given)
        return {name: item if name in cls.verbatim else _whole(item) for name, item in fields.items()}


def _whole(value: Any) -> Any:
    """Convert floats without a fraction to integers. A field for any number converts them back to floats."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < EXACT else value
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [_whole(item) for item in cast(list[Any], value)]
    return value
