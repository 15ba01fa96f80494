"""The base class and common types of requests and specs; fields by dotted path, such as `lora.rank`; their schemas."""

from __future__ import annotations

import re
import types
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Union, cast, get_args, get_origin

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


def fields_of(model: type[BaseModel], prefix: str = "", *, outer_first: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield dotted paths with their annotations: a group, then its fields, then the next group.

    outer_first: all fields of a model come before the fields of its groups.
    """
    own = [(f"{prefix}{name}", field.annotation) for name, field in model.model_fields.items()]
    if outer_first:
        yield from own
    for path, annotation in own:
        if not outer_first:
            yield path, annotation
        for group in models_in(annotation):
            yield from fields_of(group, f"{path}.", outer_first=outer_first)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models in a union, or the model itself. The items of lists and objects are not included."""
    return (part for part in plain_types(annotation) if isinstance(part, type) and issubclass(part, BaseModel))


def plain_types(annotation: Any) -> Iterator[Any]:
    """Yield the members of a union without their annotations. The items of lists and objects are not included."""
    if get_origin(annotation) is Annotated:
        yield from plain_types(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from plain_types(part)
    else:
        yield annotation


def resolved_schema(
    request: type[BaseModel], example: dict[str, Any] | None = None
) -> Callable[[dict[str, Any]], None]:
    """Return `json_schema_extra` for a response that shows a request's fields with every `auto` resolved.

    A field without a description gets that of the request's field, without the sentences that start with `auto:` and,
    if the field is never null, `null:`.
    """

    def extend(schema: dict[str, Any]) -> None:
        for name, field in schema["properties"].items():
            asked = request.model_fields.get(name)
            if asked is not None and asked.description is not None and "description" not in field:
                gone = "auto" if {"type": "null"} in field.get("anyOf", ()) else "auto|null"
                sentence = (
                    rf"(?:^|(?<=[.!?]) )(?:{gone}): [^.]*(?:\.\d[^.]*)*\."  # a dot before a digit does not end it
                )
                field["description"] = re.sub(sentence, "", asked.description).strip()
        if example is not None:
            schema["example"] = example

    return extend


def resolved(schema: dict[str, Any], spec: type[BaseModel]) -> None:
    """`json_schema_extra` of a spec, which inherits its request's fields: every field is present, without default."""
    resolved_schema(cast("type[BaseModel]", spec.__base__))(schema)
    for field in schema["properties"].values():
        field.pop("default", None)
    schema["required"] = list(schema["properties"])


def with_values(body: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a body in which each dotted path has its value. Missing groups are created."""
    changed = dict(body)
    for path, value in values.items():
        group, _, rest = path.partition(".")
        inner: Any = changed.get(group)
        known: Mapping[str, Any] = cast(Mapping[str, Any], inner) if isinstance(inner, Mapping) else {}
        changed[group] = with_values(known, {rest: value}) if rest else value
    return changed


def value_at(body: Mapping[str, Any], path: str) -> Any:
    """Return the value at the dotted path; None if the body does not set it."""
    found: Any = body
    for name in path.split("."):
        found = cast(Mapping[str, Any], found).get(name) if isinstance(found, Mapping) else None
    return found
