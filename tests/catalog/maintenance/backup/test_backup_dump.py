"""Errors when pg_dump is missing, fails, or would expose a password."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import URL, make_url

from catalog.db.database import Database
from catalog.errors import InvalidRequest
from catalog.maintenance.backup import database_dump, integrity


def test_missing_pg_dump_is_reported_with_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(database_dump, "DEBIAN", tmp_path)

    with pytest.raises(InvalidRequest) as refused:
        database_dump._run("pg_dump", URL.create("postgresql", host="127.0.0.1"), [])

    assert "postgresql-client" in refused.value.remedy


def test_pg_dump_errors_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "pg_dump"
    script.write_text("#!/bin/sh\necho 'server version mismatch' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    with pytest.raises(InvalidRequest, match="server version mismatch") as refused:
        database_dump._run("pg_dump", URL.create("postgresql", host="127.0.0.1"), [])
    assert refused.value.remedy.startswith("Install a later version")


def test_errors_of_pg_restore_are_reported_without_the_failed_sql(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "pg_restore"
    report = ["pg_restore: error: could not execute query: ERROR:  permission denied for schema public"]
    report += ["Command was: CREATE TABLE public.jobs (", ");"]
    script.write_text("#!/bin/sh\ncat >&2 <<'END'\n" + "\n".join(report) + "\nEND\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    with pytest.raises(InvalidRequest) as refused:
        database_dump._run("pg_restore", URL.create("postgresql", host="127.0.0.1"), [])

    reported = "could not execute query: ERROR:  permission denied for schema public"
    assert refused.value.message == f"{script} failed: {reported}. The database was not changed."


@pytest.mark.parametrize(
    ("url", "problem", "remedy"),
    [
        ("sqlite:////srv/lorry.db", "Tree 7\npage 3: bad.", "Stop the service and move /srv/lorry.db, with its -wal"),
        ("sqlite:////srv/lorry.db", "file is not a database", "If /srv/lorry.db is the wrong file, correct LORRY"),
        ("postgresql://lorry:canary-7@db/lorry", "invalid page", "drop the database lorry, and create it again"),
    ],
)
def test_damaged_database_is_named_with_the_steps_for_its_kind(url: str, problem: str, remedy: str) -> None:
    refused = integrity.refusal(problem, make_url(url))

    assert f"{url.replace('canary-7', '***')} is damaged: {' '.join(problem.split()).rstrip('.')}." in refused.message
    assert remedy in refused.remedy


def test_reported_damage_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "_sqlite_damage", lambda _: ["*** in database main ***\nTree 7 page 3: bad."])
    db = Database(f"sqlite:///{tmp_path / 'lorry.db'}")

    found = integrity.damage(db)

    db.close()
    assert found == ["The database is damaged: *** in database main *** Tree 7 page 3: bad."]


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a pg_dump that writes its command line to the returned file and its PGPASSWORD next to it."""
    seen = tmp_path / "seen"
    script = tmp_path / "pg_dump"
    script.write_text(f'#!/bin/sh\necho "$@" > {seen}\necho "$PGPASSWORD" > {seen}.password\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    return seen


def test_password_in_the_url_query_is_not_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = stand_in(tmp_path, monkeypatch)

    database_dump._run("pg_dump", make_url("postgresql://lorry@db/lorry?password=canary-8&sslmode=require"), [])

    assert "canary-8" not in seen.read_text()
    assert "postgresql://lorry@db/lorry?sslmode=require" in seen.read_text()
    assert Path(f"{seen}.password").read_text() == "canary-8\n"


def test_client_key_password_is_rejected_because_it_cannot_be_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = stand_in(tmp_path, monkeypatch)

    with pytest.raises(InvalidRequest) as refused:
        database_dump._run("pg_dump", make_url("postgresql://lorry@db/lorry?sslkey=k&sslpassword=canary-9"), [])

    assert refused.value.code == "secret_on_command_line"
    assert "canary-9" not in refused.value.sentence()
    assert not seen.exists()
