"""The reference pages list every job field and every setting with its limits, and nothing else."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic_settings import BaseSettings

from api.settings import ApiSettings
from catalog.settings import Settings
from catalog.spec.job import JobRequest
from tests.architecture.source_files import ROOT, source_files

JOB_FIELDS = (ROOT / "docs/reference/job-fields.md").read_text(encoding="utf-8")
SETTINGS = (ROOT / "docs/reference/settings.md").read_text(encoding="utf-8")


def test_every_field_of_a_job_is_described() -> None:
    names = [name for name, _ in _job_fields()]

    assert sorted(names) == sorted(name for name, _ in _leaves(JobRequest))


def test_documented_limits_match_the_schema() -> None:
    rows = dict(_job_fields())
    checked = {name: limits for name, schema in _leaves(JobRequest) if (limits := _limits(schema)) is not None}
    wrong = {name: (limits, rows[name]) for name, limits in checked.items() if limits not in rows[name]}

    assert wrong == {}
    assert {"optimizer.eps", "lora.rank", "max_steps", "seed"} <= checked.keys()


@pytest.mark.parametrize("settings", [Settings, ApiSettings])
def test_every_setting_is_described(settings: type[BaseSettings]) -> None:
    prefix = settings.model_config.get("env_prefix", "")
    named = {f"{prefix}{name}".upper() for name in settings.model_fields}

    assert named <= _first_columns(SETTINGS)


def test_every_environment_variable_is_described() -> None:
    assert set(_variables_in_code()) <= _first_columns(SETTINGS)


def test_every_described_setting_is_used() -> None:
    described = {name for name in _first_columns(SETTINGS) if name.startswith("LORRY_")}
    fields = {f"LORRY_{name}".upper() for kind in (Settings, ApiSettings) for name in kind.model_fields}

    assert described <= fields | set(_variables_in_code())


def _variables_in_code() -> list[str]:
    sources = "".join(source.text for source in source_files("api", "catalog", "worker", "lorry"))
    return re.findall(r"\bLORRY_[A-Z][A-Z_]*[A-Z]\b", sources)


def _job_fields() -> list[tuple[str, str]]:
    """Return (name, type and limits) of each row and each of its names. `a.{b,c}` stands for `a.b` and `a.c`."""
    rows: list[tuple[str, str]] = re.findall(r"^\| (`[\w.{},` ]+`) \| (.*?) \|", JOB_FIELDS, re.MULTILINE)
    found: list[tuple[str, str]] = []
    for names, limits in rows:
        for name in re.findall(r"`([^`]+)`", names):
            start, _, rest = name.partition("{")
            options, _, end = rest.partition("}")
            found += [(f"{start}{option}{end}", limits) for option in options.split(",")]
    return found


def _first_columns(text: str) -> set[str]:
    return set(re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE))


def _leaves(model: type[BaseModel], prefix: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Return the dotted names of the leaf fields, such as `lora.rank`, with their JSON schemas."""
    leaves: list[tuple[str, dict[str, Any]]] = []
    schemas = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        inner = next(iter(_models(field.annotation)), None)
        leaves += _leaves(inner, f"{prefix}{name}.") if inner else [(f"{prefix}{name}", schemas[name])]
    return leaves


def _limits(schema: dict[str, Any]) -> str | None:
    """Return a number's limits as the document writes them, or None for a field without limits."""
    for part in schema.get("anyOf", [schema]):
        match part:
            case {"minimum": lowest, "maximum": highest}:
                return f"{_number(lowest)} to {_number(highest)}"
            case {"minimum": lowest, "exclusiveMaximum": bound}:
                return f"{_number(lowest)} to below {_number(bound)}"
            case {"exclusiveMinimum": bound, "maximum": highest}:
                return f"above {_number(bound)}, at most {_number(highest)}"
            case _:
                assert not part.keys() & {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}, part
    return None


def _number(value: float) -> str:
    """Format a number as the document does: 1,000,000 or 1e-37."""
    return f"{value:g}".replace("e+", "e") if value != int(value) or value >= 1e15 else f"{int(value):,}"


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]
