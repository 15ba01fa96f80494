"""Settings hide passwords when they are printed, logged or dumped, and invalid or unknown variables are named."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import pytest

from api.settings import ApiSettings
from catalog.settings import OF_API_SERVER, InvalidSettings, Settings, unknown_variables

URLS = {
    "database_url": "postgresql+psycopg://lorry:hunter22hunter22@database/lorry",
    "redis_url": "redis://:hunter22hunter22@broker:6379/0",
}


@pytest.mark.parametrize("name", sorted(URLS))
def test_printed_settings_hide_passwords_in_urls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"LORRY_{name.upper()}", URLS[name])

    settings = Settings()

    printed = (repr(settings), str(settings), str(settings.model_dump()), settings.model_dump_json())
    assert not [text for text in printed if "hunter22" in text]


def test_resolved_urls_equal_the_configured_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, url in URLS.items():
        monkeypatch.setenv(f"LORRY_{name.upper()}", url)

    settings = Settings()

    assert settings.resolved_database_url() == URLS["database_url"]
    assert settings.resolved_redis_url() == URLS["redis_url"]


@pytest.mark.parametrize("value", [None, ""])
def test_default_database_is_a_file_and_there_is_no_broker(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in URLS:
        if value is None:
            monkeypatch.delenv(f"LORRY_{name.upper()}", raising=False)
        else:
            monkeypatch.setenv(f"LORRY_{name.upper()}", value)

    settings = Settings()

    assert settings.resolved_database_url().startswith("sqlite:///")
    assert settings.resolved_redis_url() is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"LEASE_SECONDS": "6"}, "LORRY_HEARTBEAT_SECONDS is 10, more than a third of LORRY_LEASE_SECONDS (6), so "),
        ({"HEARTBEAT_SECONDS": "25", "LEASE_SECONDS": "600"}, "LORRY_HEARTBEAT_SECONDS is invalid. Input should be "),
        ({"LEASE_SECONDS": "hunter22"}, "LORRY_LEASE_SECONDS is invalid. Input should be a valid number, unable to "),
        ({"GANG_SIZE": "2", "GANG_MIN_SIZE": "3"}, "LORRY_GANG_MIN_SIZE is invalid. LORRY_GANG_SIZE is 2: no trainer "),
        ({"MAX_ROWS": "x", "IDLE_SECONDS": "-1"}, "LORRY_MAX_ROWS is invalid. "),
        ({"MAX_ROWS": "x", "IDLE_SECONDS": "-1"}, "LORRY_IDLE_SECONDS is invalid. "),
    ],
)
def test_invalid_settings_are_named_without_secrets(
    given: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**given, "DATABASE_URL": URLS["database_url"]}.items():
        monkeypatch.setenv(f"LORRY_{name}", value)

    with pytest.raises(InvalidSettings) as caught:
        Settings()

    assert message in caught.value.message
    shown = "".join(traceback.format_exception(caught.value))
    assert "hunter22" not in shown


def test_settings_of_the_api_server_are_checked_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_SHUTDOWN_SECONDS", "-1")

    with pytest.raises(InvalidSettings, match=r"LORRY_SHUTDOWN_SECONDS is invalid\. Input should be greater than"):
        ApiSettings()


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
    (warning,) = unknown_variables({name: "hunter22", "HOME": "/root"})

    assert warning == f"{name} is not a setting of this version of Lorry, so it has no effect. {fix}"


@pytest.mark.parametrize(
    "name",
    [
        "LORRY_DATA_DIR", "lorry_data_dir", "LORRY_DEVICE", "LORRY_TEST_VLLM", "LORRYMAN", "OTHER",
        "LORRY_SERVICE_HOST", "LORRY_API_SERVICE_PORT_HTTP", "LORRY_PORT_8000_TCP_ADDR",
    ],
)  # fmt: skip
def test_variables_with_a_meaning_are_not_reported(name: str) -> None:
    assert unknown_variables({name: "1"}) == []


def test_port_is_reported_unless_kubernetes_has_set_it() -> None:
    assert len(unknown_variables({"LORRY_PORT": "8000"})) == 1
    assert unknown_variables({"LORRY_PORT": "tcp://10.0.0.1:8000"}) == []


def test_empty_variables_are_not_reported() -> None:
    assert unknown_variables({"LORRY_DEVICES": ""}) == []


def test_every_setting_of_the_api_server_is_known() -> None:
    assert {name.upper() for name in ApiSettings.model_fields} == OF_API_SERVER


@pytest.mark.parametrize("page", ["docs/reference/settings.md", ".env.example", "docker-compose.yml"])
def test_every_documented_variable_is_known(page: str) -> None:
    named = set(re.findall(r"\bLORRY_[A-Z][A-Z_]*[A-Z]\b", (ROOT / page).read_text("utf-8")))

    assert named
    assert unknown_variables(dict.fromkeys(named, "1")) == []
