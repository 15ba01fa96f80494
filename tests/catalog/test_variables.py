"""Environment variables LORRY_… without a meaning are reported at start-up."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from api.settings import ApiSettings
from catalog import variables

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("LORRY_DEVICES", "Did you mean LORRY_DEVICE?"),
        ("LORRY_DATABASE", "Did you mean LORRY_DATABASE_URL?"),
        ("lorry_max_row", "Did you mean LORRY_MAX_ROWS?"),
        ("LORRY_COLOR_OF_THE_TRUCK", "Unset it, or see the reference of settings."),
    ],
)
def test_unknown_variable_is_reported_with_the_nearest_name_and_without_its_value(name: str, fix: str) -> None:
    (warning,) = variables.unknown({name: "hunter22", "HOME": "/root"})

    assert warning == f"{name} is not a setting of this version of Lorry, so it has no effect. {fix}"


@pytest.mark.parametrize(
    "name",
    [
        "LORRY_DATA_DIR", "lorry_data_dir", "LORRY_DEVICE", "LORRY_TEST_VLLM", "LORRYMAN", "OTHER",
        "LORRY_SERVICE_HOST", "LORRY_API_SERVICE_PORT_HTTP", "LORRY_PORT_8000_TCP_ADDR",
    ],
)  # fmt: skip
def test_variables_with_a_meaning_are_not_reported(name: str) -> None:
    assert variables.unknown({name: "1"}) == []


def test_port_is_reported_unless_kubernetes_has_set_it() -> None:
    assert len(variables.unknown({"LORRY_PORT": "8000"})) == 1
    assert variables.unknown({"LORRY_PORT": "tcp://10.0.0.1:8000"}) == []


def test_empty_variables_are_not_reported() -> None:
    assert variables.unknown({"LORRY_DEVICES": ""}) == []


def test_every_setting_of_the_api_server_is_known() -> None:
    assert {name.upper() for name in ApiSettings.model_fields} == variables.OF_API_SERVER


@pytest.mark.parametrize("page", ["docs/reference/settings.md", ".env.example", "docker-compose.yml"])
def test_every_documented_variable_is_known(page: str) -> None:
    named = set(re.findall(r"\bLORRY_[A-Z][A-Z_]*[A-Z]\b", (ROOT / page).read_text("utf-8")))

    assert named
    assert variables.unknown(dict.fromkeys(named, "1")) == []
