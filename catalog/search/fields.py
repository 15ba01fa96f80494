"""The fields of a job that a sweep may vary, by dotted path, and what kind of number each holds. Pure."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic import BaseModel

from catalog.errors import InvalidRequest
from catalog.spec.job import JobRequest

Kind = Literal["integer", "number", "other"]
FIXED: dict[str, str] = {
    "model": "the trials of a sweep train on one base model",
    "training_file": "the trials of a sweep are compared on the same data",
    "validation_file": "the trials of a sweep are compared on the same data",
    "suffix": "it names adapters, and changes none",
    "metadata": "it labels jobs, and changes none",
    "integrations": "they change no adapter",
    "priority": "it decides when a job trains, and changes no adapter",
}
"""What a sweep can't vary, and why."""
OTHER_NAMES = {"lr": "learning_rate", "epochs": "n_epochs", "r": "rank", "target": "target_modules"}
"""Last names that people use, and the fields' own."""
ALIKE = 0.7
MAX_SHOWN = 80
"""Characters of a path that nobody knows; it may be any text of any length."""


def check_path(path: str, *, param: str) -> None:
    """Raises InvalidRequest where no field of a job has the path, or it is one that all trials share."""
    shown, param = path[:MAX_SHOWN], param[: MAX_SHOWN + len(param) - len(path)]
    reason = FIXED.get(path.split(".", 1)[0])
    if path in VARIABLE:
        return
    if reason is not None:
        raise InvalidRequest(
            f"A sweep can't vary {shown!a}: {reason}.",
            code="fixed_in_a_sweep",
            remedy="Give it once, beside `parameters`; or make a sweep for each.",
            param=param,
        )
    near = _nearest(shown, VARIABLE)
    raise InvalidRequest(
        f"A job has no field {shown!a}.",
        code="unknown_parameter",
        remedy=f"Did you mean {near!r}?" if near else "Name a field of a job by its dotted path, as 'lora.rank'.",
        param=param,
    )


def kind_of(path: str) -> Kind:
    """Of a path that exists: what its numbers are; `other` where it holds none."""
    annotation = dict(_fields(JobRequest))[path]
    plain = set(_plain_types(annotation))
    return "number" if float in plain else "integer" if int in plain else "other"


def fields_in(path: str) -> list[str]:
    """Of a group; none of any other field."""
    return [inner for inner, _ in _fields(JobRequest) if inner.rpartition(".")[0] == path]


def with_values(body: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a job's body in which each path has its value; what was not there around it is made."""
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
    """None where nothing is said."""
    found: Any = body
    for name in path.split("."):
        found = cast(Mapping[str, Any], found).get(name) if isinstance(found, Mapping) else None
    return found


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths with their annotations, those of an object before those in it."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field.annotation
        for inner in _models_in(field.annotation):
            yield from _fields(inner, f"{prefix}{name}.")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    return (part for part in _plain_types(annotation) if isinstance(part, type) and issubclass(part, BaseModel))


def _plain_types(annotation: Any) -> Iterator[Any]:
    """The parts of a union, without what they are annotated with. What lists and objects hold is not looked at."""
    if get_origin(annotation) is Annotated:
        yield from _plain_types(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _plain_types(part)
    else:
        yield annotation


def _nearest(path: str, known: list[str]) -> str | None:
    """The same last name wherever it belongs, else the most alike, as a whole or in its last name."""
    name = path.rpartition(".")[2].lstrip("-").replace("-", "_")
    name = OTHER_NAMES.get(name, name)
    same = next((item for item in known if _last(item) == name), None)
    best = same or max(known, key=lambda item: max(_likeness(path, item), _likeness(name, _last(item))))
    is_alike = max(_likeness(path, best), _likeness(name, _last(best))) >= ALIKE
    return best if is_alike else None


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


VARIABLE = [path for path, _ in _fields(JobRequest) if path.split(".", 1)[0] not in FIXED]
"""Paths of the fields that a sweep may vary."""
