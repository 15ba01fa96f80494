"""Allowed values of options of `lorry jobs submit`, and parsing of PATH=VALUE."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import typer


class Method(StrEnum):
    """Training methods: on answers, on preference pairs, or on answers with labels."""

    supervised = "supervised"
    dpo = "dpo"
    orpo = "orpo"
    simpo = "simpo"
    kto = "kto"


class Priority(StrEnum):
    """Priorities in the queue."""

    urgent = "urgent"
    normal = "normal"
    batch = "batch"


class Precision(StrEnum):
    """Precisions of the base model's weights."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Quantization(StrEnum):
    """Quantizations of the base model's linear layers."""

    none = "none"
    nf4 = "nf4"
    int8 = "int8"


class ScheduleName(StrEnum):
    """Learning rate schedules after the warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"


class OptimizerName(StrEnum):
    """Optimizers."""

    adamw = "adamw"
    sgd = "sgd"
    adafactor = "adafactor"


class Loss(StrEnum):
    """Assistant messages of a chat that are trained on."""

    assistant = "assistant"
    last_turn = "last_turn"


class Overflow(StrEnum):
    """Handling of rows that are too long."""

    truncate = "truncate"
    drop = "drop"
    split_ = "split"  # str has a split of its own


class Keep(StrEnum):
    """Weights that become the adapter."""

    last = "last"
    best = "best"


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
