"""The reference pages list every job field and every setting once, and nothing else."""

from __future__ import annotations

import re

import pytest
from pydantic import BaseModel

from api.settings import ApiSettings
from catalog.settings import Settings
from catalog.spec.job import JobRequest
from tests.architecture.source_files import ROOT, source_files
from tools.site import PART, with_parts

REFERENCE = ROOT / "docs/reference"


@pytest.mark.parametrize(
    ("page", "part", "model"), [("job-fields", "job_fields", JobRequest), ("settings", "settings", Settings)]
)
def test_each_field_is_in_one_table(page: str, part: str, model: type[BaseModel]) -> None:
    tables = PART.findall((REFERENCE / f"{page}.md").read_text("utf-8"))

    named = [name for table, names in tables if table == part for name in names.split()]

    assert sorted(named) == sorted(model.model_fields)


def test_every_environment_variable_is_described() -> None:
    assert _variables_in_code() <= _described()


def test_every_described_setting_is_used() -> None:
    fields = {f"LORRY_{name}".upper() for kind in (Settings, ApiSettings) for name in kind.model_fields}

    assert fields <= _described()
    assert {name for name in _described() if name.startswith("LORRY_")} <= fields | _variables_in_code()


def _described() -> set[str]:
    page = with_parts((REFERENCE / "settings.md").read_text("utf-8"))
    return set(re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE))


def _variables_in_code() -> set[str]:
    sources = "".join(source.text for source in source_files("api", "catalog", "worker", "lorry"))
    return set(re.findall(r"\bLORRY_[A-Z][A-Z_]*[A-Z]\b", sources))
