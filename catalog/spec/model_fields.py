"""The fields of a pydantic model by dotted path, such as `lora.rank`. Pure."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

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
