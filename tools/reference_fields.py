"""Tables of job fields and settings for the reference pages, from the pydantic models that validate them."""

import json
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from api.settings import ApiSettings
from catalog.settings import Settings
from catalog.spec.job import JobRequest
from tools.json_schema import Json, cell, number, type_of

DEFAULT = re.compile(r"(?:^|(?<=[.!?]) )(?:auto|null|Default): ([^.]*(?:\.\d[^.]*)*)\.")
"""The sentence of a description that explains the default; a dot before a digit does not end it."""
SIZES = ((30, "GiB"), (20, "MiB"))


def job_fields(*names: str, request: type[BaseModel] = JobRequest) -> str:
    """Return a table of these top-level fields of a job request, and the fields in them."""
    parts = ["| Field | Type and limits | Default | Meaning |", "|---|---|---|---|"]
    rows: dict[tuple[str, str], list[str]] = {}
    for path, field, schema in leaves(request):
        if path.partition(".")[0] in names:
            meaning, default = texts(field)
            row = f"{type_of(schema)} | {cell(default)} | {cell(meaning)}"
            rows.setdefault((path.rpartition(".")[2], row), []).append(path)
    parts += [f"| {_joined(paths)} | {row} |" for (_, row), paths in rows.items()]
    return "\n".join(parts)


def _joined(paths: Sequence[str]) -> str:
    """Return equal fields once: `a.{b,c}.d` for paths that differ in their second part."""
    second: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        first, _, rest = path.partition(".")
        part, dot, end = rest.partition(".")
        second.setdefault((first, dot + end), []).append(part)
    named = [
        first + (f".{parts[0]}" if len(parts) == 1 else f".{{{','.join(parts)}}}") * bool(parts[0]) + end
        for (first, end), parts in second.items()
    ]
    return ", ".join(f"`{name}`" for name in named)


def settings(*names: str) -> str:
    return _settings(Settings, names)


def api_settings() -> str:
    return _settings(ApiSettings, list(ApiSettings.model_fields))


def _settings(model: type[BaseSettings], names: Sequence[str]) -> str:
    schemas = model.model_json_schema()["properties"]
    parts = ["| Variable | Type and limits | Default | Meaning |", "|---|---|---|---|"]
    for name in names:
        meaning, default = texts(model.model_fields[name])
        variable = f"{model.model_config.get('env_prefix', '')}{name}".upper()
        parts.append(f"| `{variable}` | {type_of(schemas[name])} | {cell(default)} | {cell(meaning)} |")
    return "\n".join(parts)


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo, Json]]:
    """Yield (dotted path, field, JSON schema) of each field that is not itself a model."""
    document = model.model_json_schema()
    for name, field in model.model_fields.items():
        inner = next(_models(field.annotation), None)
        if inner is not None:
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            schema = document["properties"][name]
            reference = schema.get("$ref", "").rpartition("/")[2]
            yield f"{prefix}{name}", field, document["$defs"][reference] if reference else schema


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in get_args(annotation):
        yield from _models(argument)


def texts(field: FieldInfo) -> tuple[str, str]:
    """Return the meaning and the default. The description's sentence about the default is in the latter only."""
    text = " ".join((field.description or "").split())
    explained = DEFAULT.search(text)
    if explained is not None and (field.default is None or field.default == "auto"):
        text = (text[: explained.start()] + text[explained.end() :]).strip()
        return text, explained[1] if field.default is None else f"`auto`: {explained[1]}"
    if field.is_required():
        return text, "required"
    return text, "none" if field.default is None else _value(field.default)


def _value(value: Any) -> str:
    if isinstance(value, Path):
        return f"`{str(value).replace(str(Path.home()), '~')}`"
    if isinstance(value, bool) or value in ({}, ""):
        return {"": "none"}.get(str(value), f"`{json.dumps(value)}`")
    if isinstance(value, int | float):
        size = next((f" ({int(value) >> bits} {unit})" for bits, unit in SIZES if _is_multiple(value, bits)), "")
        return number(value) + size
    return f"`{value}`"


def _is_multiple(value: float, bits: int) -> bool:
    return isinstance(value, int) and value > 0 and value % (1 << bits) == 0
