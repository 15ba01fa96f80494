"""The job fields that a sweep may vary, by dotted path, and the kind of number that each contains. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal, cast

from catalog.errors import InvalidRequest
from catalog.spec.job import JobRequest
from catalog.spec.model_fields import fields_of, plain_types

Kind = Literal["integer", "number", "other"]
FIXED: dict[str, str] = {
    "model": "all trials of a sweep train on the same base model",
    "training_file": "all trials of a sweep are compared on the same data",
    "validation_file": "all trials of a sweep are compared on the same data",
    "suffix": "it only names adapters",
    "metadata": "it only labels jobs",
    "integrations": "they do not affect the adapter",
    "must_serve_on": "it only restricts the other fields",
    "priority": "it only affects when a job trains",
}
"""Fields that a sweep can't vary, and the reasons."""
OTHER_NAMES = {"lr": "learning_rate", "epochs": "n_epochs", "r": "rank", "target": "target_modules"}
"""Common other names of fields, and the last part of the field's path."""
ALIKE = 0.7
MAX_SHOWN = 80
"""Maximum number of characters of an unknown path in a message."""


def check_path(path: str, *, param: str) -> None:
    """Raises InvalidRequest if no job field has the path, or if all trials must share the field."""
    shown, param = path[:MAX_SHOWN], param[: MAX_SHOWN + len(param) - len(path)]
    reason = FIXED.get(path.split(".", 1)[0])
    if path in VARIABLE:
        return
    if reason is not None:
        raise InvalidRequest(
            f"A sweep can't vary {shown!a}, because {reason}.",
            code="fixed_in_a_sweep",
            remedy=f"Remove {shown!a} from 'parameters'. To use several values, create one sweep for each.",
            param=param,
        )
    similar = _nearest(shown, VARIABLE)
    raise InvalidRequest(
        f"There is no job field {shown!a}.",
        code="unknown_parameter",
        remedy=f"Did you mean {similar!r}? Use the dotted path of a job field."
        if similar
        else "Use the dotted path of a job field, such as 'lora.rank'.",
        param=param,
    )


def kind_of(path: str) -> Kind:
    """Return the kind of number of an existing path; `other` if it does not contain a number."""
    annotation = dict(fields_of(JobRequest))[path]
    plain = set(plain_types(annotation))
    return "number" if float in plain else "integer" if int in plain else "other"


def fields_in(path: str) -> list[str]:
    """Return the paths of the fields in a group; empty for any other field."""
    return [inner for inner, _ in fields_of(JobRequest) if inner.rpartition(".")[0] == path]


def with_values(body: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a job's body in which each path has its value. Missing groups are created."""
    changed = dict(body)
    for path, value in values.items():
        *groups, name = path.split(".")
        place = changed
        for group in groups:
            inner: Any = place.get(group)
            copied: dict[str, Any] = dict(cast(Mapping[str, Any], inner)) if isinstance(inner, Mapping) else {}
            place[group] = copied
            place = copied
        place[name] = value
    return changed


def value_at(body: Mapping[str, Any], path: str) -> Any:
    """Return the value at the path; None if the body does not set it."""
    found: Any = body
    for name in path.split("."):
        found = cast(Mapping[str, Any], found).get(name) if isinstance(found, Mapping) else None
    return found


def _nearest(path: str, known: list[str]) -> str | None:
    """Return a known path with the same last part, else the most similar path; None if none is similar enough."""
    name = path.rpartition(".")[2].lstrip("-").replace("-", "_")
    name = OTHER_NAMES.get(name, name)
    same = next((item for item in known if _last(item) == name), None)
    best = same or max(known, key=lambda item: max(_similarity(path, item), _similarity(name, _last(item))))
    is_alike = max(_similarity(path, best), _similarity(name, _last(best))) >= ALIKE
    return best if is_alike else None


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _similarity(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


VARIABLE = [path for path, _ in fields_of(JobRequest) if path.split(".", 1)[0] not in FIXED]
"""Paths of the fields that a sweep may vary."""
