"""The fields of a pydantic model or a body by dotted path, such as `lora.rank`. Schemas of resolved fields. Pure."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Union, cast, get_args, get_origin

from pydantic import BaseModel


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
