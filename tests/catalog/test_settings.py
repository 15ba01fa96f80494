"""Settings hide passwords when they are printed, logged or dumped, and name the variables that are invalid."""

from __future__ import annotations

import traceback

import pytest

from api.settings import ApiSettings
from catalog.settings import InvalidSettings, Settings

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
