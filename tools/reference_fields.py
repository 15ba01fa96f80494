"""Tables of job fields and settings for the reference pages, from the pydantic models that validate them."""

import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from api.settings import ApiSettings
from catalog.settings import Settings
from catalog.spec.job import JobRequest

Json = Mapping[str, Any]
JOB_FIELDS: Mapping[str, Sequence[str]] = {
    "model-and-data": (
        "model", "parent_adapter", "training_file", "validation_file", "max_length", "data",
    ),
    "methods": ("method", "hyperparameters"),
    "lora": ("lora",),
    "optimizer": ("optimizer", "schedule"),
    "steps": ("max_steps", "checkpoint_every_steps", "evaluation", "early_stopping"),
    "base-model": ("precision", "quantization", "resources"),
    "queue": ("priority", "deadline"),
    "labels": ("suffix", "seed", "metadata", "tags", "must_serve_on"),
    "trackers": ("integrations",),
}  # fmt: skip
"""Top-level fields of a job request, by the table of the page that they are in."""
SETTINGS: Mapping[str, Sequence[str]] = {
    "storage": ("data_dir", "database_url", "redis_url", "store_url", "pepper", "previous_pepper"),
    "uploads": (
        "max_file_bytes", "max_line_bytes", "max_rows", "max_open_uploads", "max_open_upload_bytes",
    ),
    "liveness": ("lease_seconds", "heartbeat_seconds", "poll_seconds"),
    "trainers": (
        "idle_seconds", "standby_trainer", "max_jobs_per_trainer", "max_slowdown", "batch_invariant",
        "cpu_processes",
    ),
    "devices": (
        "inference_address", "strategy", "cpu_offload_bytes", "gang", "gang_size", "gang_min_size", "gang_wait_seconds",
        "gang_join_seconds", "advertise_address",
    ),
    "scheduling": (
        "share_half_life_seconds", "priority_aging_seconds", "preempt_after_seconds",
        "preemption_min_runtime_seconds", "max_preemptions",
    ),
    "exports": ("hub_repositories", "gguf_converter"),
    "trackers": ("integrations", "mlflow_tracking_uri", "tensorboard_dir"),
}  # fmt: skip
"""Fields of Settings, by the table of the page that they are in."""
DEFAULT = re.compile(r"(?:^|(?<=[.!?]) )(?:auto|null|Default): ([^.]*(?:\.\d[^.]*)*)\.")
"""The sentence of a description that explains the default; a dot before a digit does not end it."""


def job_fields(name: str, request: type[BaseModel] = JobRequest) -> str:
    """Return one table of job-fields.md. Raises ValueError if a field of the request is in no table."""
    placed = [field for fields in JOB_FIELDS.values() for field in fields]
    if sorted(placed) != sorted(request.model_fields):
        raise ValueError(f"each job field needs one table: {set(placed) ^ set(request.model_fields)}")
    parts = ["| Field | Type and limits | Default | Meaning |", "|---|---|---|---|"]
    rows: dict[tuple[str, str], list[str]] = {}
    for path, field, schema in leaves(request):
        if path.partition(".")[0] in JOB_FIELDS[name]:
            meaning, default = texts(field)
            row = f"{_type(schema)} | {default} | {meaning}"
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


def settings(name: str) -> str:
    """Return one table of settings.md. Raises ValueError if a field of Settings is in no table."""
    placed = [field for fields in SETTINGS.values() for field in fields]
    if sorted(placed) != sorted(Settings.model_fields):
        raise ValueError(f"each setting needs one table: {set(placed) ^ set(Settings.model_fields)}")
    return _settings(Settings, SETTINGS[name])


def api_settings() -> str:
    return _settings(ApiSettings, list(ApiSettings.model_fields))


def _settings(model: type[BaseSettings], names: Sequence[str]) -> str:
    schemas = model.model_json_schema()["properties"]
    parts = ["| Variable | Type and limits | Default | Meaning |", "|---|---|---|---|"]
    for name in names:
        meaning, default = texts(model.model_fields[name])
        variable = f"{model.model_config.get('env_prefix', '')}{name}".upper()
        parts.append(f"| `{variable}` | {_type(schemas[name])} | {default} | {meaning} |")
    return "\n".join(parts)


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo, Json]]:
    """Yield (dotted path, field, JSON schema) of each field that is not itself a model."""
    document = model.model_json_schema()
    for name, field in model.model_fields.items():
        inner = next(_models(field.annotation), None)
        if inner is not None:
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field, _resolved(document["properties"][name], document.get("$defs", {}))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in get_args(annotation):
        yield from _models(argument)


def _resolved(schema: Json, definitions: Json) -> Json:
    reference = schema.get("$ref")
    return schema if reference is None else definitions[reference.rpartition("/")[2]]


def texts(field: FieldInfo) -> tuple[str, str]:
    """Return the meaning and the default. The description's sentence about the default is in the latter only."""
    text = " ".join((field.description or "").split())
    explained = DEFAULT.search(text)
    if explained is not None and (field.default is None or field.default == "auto"):
        text = (text[: explained.start()] + text[explained.end() :]).strip()
        default = explained[1] if field.default is None else f"`auto`: {explained[1]}"
    elif field.is_required():
        default = "required"
    elif field.default is None:
        default = "none"
    else:
        default = _value(field.default)
    return text.replace("|", "\\|"), default.replace("|", "\\|")


def _value(value: Any) -> str:
    if isinstance(value, Path):
        return f"`{str(value).replace(str(Path.home()), '~')}`"
    if isinstance(value, bool) or value in ({}, ""):
        return {"": "none"}.get(str(value), f"`{json.dumps(value)}`")
    if isinstance(value, int | float):
        size = next((f" ({int(value) >> bits} {unit})" for bits, unit in UNITS if _is_multiple(value, bits)), "")
        return number(value) + size
    return f"`{value}`"


UNITS = ((30, "GiB"), (20, "MiB"))


def _is_multiple(value: float, bits: int) -> bool:
    return isinstance(value, int) and value > 0 and value % (1 << bits) == 0


def _type(schema: Json) -> str:
    """Return the type and the limits in words."""
    alternatives = [part for part in schema.get("anyOf", ()) if part.get("type") != "null"]
    if alternatives:
        common = {key: schema[key] for key in ("maxProperties", "propertyNames") if key in schema}
        return "; or ".join(_type(part | common if part.get("type") == "object" else part) for part in alternatives)
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    match schema.get("type"):
        case "integer" | "number" as kind:
            limits = number_limits(schema)
            text = "whole number" if kind == "integer" else "number"
            text += f", {limits}" if limits else ""
        case "boolean":
            text = "`true` or `false`"
        case "array":
            text = f"list{_count(schema, 'Items', 'items')}; each: {_type(schema.get('items', {}))}"
        case "object":
            keys = _characters(schema.get("propertyNames", {}))
            values = _type(schema.get("additionalProperties") or _pattern_values(schema))
            text = f"object{_count(schema, 'Properties', 'pairs')}; keys: {keys}; values: {values}"
        case _:
            text = _characters(schema) if schema.get("format") != "path" else "path"
    return text


def _pattern_values(schema: Json) -> Json:
    return next(iter(schema.get("patternProperties", {}).values()), {})


def _characters(schema: Json) -> str:
    lowest, highest = schema.get("minLength"), schema.get("maxLength")
    if highest is not None:
        return f"text, {lowest or 0:,} to {highest:,} characters" if lowest else f"text, at most {highest:,} characters"
    return "text"


def _count(schema: Json, of: str, noun: str) -> str:
    least, most = schema.get(f"min{of}"), schema.get(f"max{of}")
    if most is None:
        return ""
    return f" of {least:,} to {most:,} {noun}" if least else f" of at most {most:,} {noun}"


def number_limits(schema: Json) -> str | None:
    """Return the limits of a number in words; None if it has none."""
    match schema:
        case {"minimum": lowest, "maximum": highest}:
            return f"{number(lowest)} to {number(highest)}"
        case {"minimum": lowest, "exclusiveMaximum": bound}:
            return f"{number(lowest)} to below {number(bound)}"
        case {"exclusiveMinimum": bound, "maximum": highest}:
            return f"above {number(bound)}, at most {number(highest)}"
        case {"minimum": lowest}:
            return f"at least {number(lowest)}"
        case {"exclusiveMinimum": bound}:
            return f"above {number(bound)}"
        case _:
            return None


def number(value: float) -> str:
    """Return 1,000,000 or 1e-37."""
    if value == int(value) and value < 1e15:
        return f"{int(value):,}"
    return f"{value:g}".replace("e+", "e").replace("e-0", "e-")
