"""What a person types as PATH=VALUE, as the parts of a request's body."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable


def pair(given: str, option: str, form: str) -> tuple[str, str]:
    name, equals, value = given.partition("=")
    if not (name and equals):
        raise typer.BadParameter(f"{given!r} is not of the form {form}.", param_hint=option)
    return name, value


def json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def nested(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Dotted paths as objects in objects. No path is another one or lies in it."""
    body: dict[str, Any] = {}
    for path, value in fields:
        *groups, name = path.split(".")
        place = body
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return body
