"""docs/CONFIGURATION.md names every field of a job and every setting, and no other."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic_settings import BaseSettings

from api.settings import ApiSettings
from catalog.settings import Settings
from catalog.spec import JobRequest
from tests.architecture.source_files import ROOT, source_files

TEXT = (ROOT / "docs/CONFIGURATION.md").read_text(encoding="utf-8")


def test_every_field_of_a_job_is_described() -> None:
    section = TEXT.partition("## What a job may say")[2].partition("\n## ")[0]

    assert _first_columns(section) == set(_fields(JobRequest))


@pytest.mark.parametrize("settings", [Settings, ApiSettings])
def test_every_setting_is_described(settings: type[BaseSettings]) -> None:
    prefix = settings.model_config.get("env_prefix", "")
    named = {f"{prefix}{name}".upper() for name in settings.model_fields}

    assert named <= _first_columns(TEXT)


def test_every_variable_that_code_names_is_described() -> None:
    assert set(_variables_in_code()) <= _first_columns(TEXT)


def test_no_setting_is_described_that_nobody_reads() -> None:
    described = {name for name in _first_columns(TEXT) if name.startswith("LORRY_")}
    fields = {f"LORRY_{name}".upper() for kind in (Settings, ApiSettings) for name in kind.model_fields}

    assert described <= fields | set(_variables_in_code())


def _variables_in_code() -> list[str]:
    sources = "".join(source.text for source in source_files("api", "catalog", "worker", "lorry"))
    return re.findall(r"\bLORRY_[A-Z][A-Z_]*[A-Z]\b", sources)


def _first_columns(text: str) -> set[str]:
    return set(re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE))


def _fields(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of the leaves: `lora.rank`."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        inner = next(iter(_models(field.annotation)), None)
        names += _fields(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return names


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]
