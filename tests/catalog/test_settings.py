"""Settings that may hold a password do not show it when settings are printed, logged or dumped."""

from __future__ import annotations

import pytest

from catalog.settings import Settings

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
