"""Allowed values of options of `lorry jobs submit`, and parsing of PATH=VALUE."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import typer


class Priority(StrEnum):
    """Priorities in the queue."""

    urgent = "urgent"
    normal = "normal"
    batch = "batch"


if TYPE_CHECKING:
    from collections.abc import Iterable


def pair(given: str, option: str, form: str) -> tuple[str, str]:
    name, equals, value = given.partition("=")
    if not (name and equals):
        raise typer.BadParameter(f"{given!r} is not in the form {form}.", param_hint=option)
    return name, value


def json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def nested(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Turn dotted paths into nested objects. No path may be equal to another one or lie in it."""
    body: dict[str, Any] = {}
    for path, value in fields:
        *groups, name = path.split(".")
        place = body
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return body
