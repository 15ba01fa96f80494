"""What an option of `lorry jobs submit` may be where it is one of a few words."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import typer


class Method(StrEnum):
    """What the adapter learns by: answers, pairs of a better and a worse one, or answers with labels."""

    supervised = "supervised"
    dpo = "dpo"
    orpo = "orpo"
    simpo = "simpo"
    kto = "kto"


class Priority(StrEnum):
    """Whose turn comes first."""

    urgent = "urgent"
    normal = "normal"
    batch = "batch"


class Precision(StrEnum):
    """Of the base model's weights."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Quantization(StrEnum):
    """How the base model's linear layers are held."""

    none = "none"
    nf4 = "nf4"
    int8 = "int8"


class ScheduleName(StrEnum):
    """How the learning rate goes down from its peak."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"


class OptimizerName(StrEnum):
    """What turns gradients into updates."""

    adamw = "adamw"
    sgd = "sgd"
    adafactor = "adafactor"


class Loss(StrEnum):
    """Which answers of a chat are learnt."""

    assistant = "assistant"
    last_turn = "last_turn"


class Overflow(StrEnum):
    """What becomes of a row that is too long."""

    truncate = "truncate"
    drop = "drop"
    split_ = "split"  # str has a split of its own


class Keep(StrEnum):
    """Whose weights become the adapter."""

    last = "last"
    best = "best"


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
