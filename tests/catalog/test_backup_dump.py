"""What is told where pg_dump can't do what a backup asks of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import URL

from catalog.backup import dump
from catalog.errors import InvalidRequest


def test_without_pg_dump_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(dump, "DEBIAN", tmp_path)

    with pytest.raises(InvalidRequest) as refused:
        dump._run("pg_dump", URL.create("postgresql", host="127.0.0.1"), [])

    assert "postgresql-client" in refused.value.remedy


def test_what_pg_dump_says_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "pg_dump"
    script.write_text("#!/bin/sh\necho 'server version mismatch' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    with pytest.raises(InvalidRequest, match="server version mismatch"):
        dump._run("pg_dump", URL.create("postgresql", host="127.0.0.1"), [])
