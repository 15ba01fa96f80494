"""Dumps the database to one file and restores it: SQLite's online backup, PostgreSQL's pg_dump and pg_restore.

The referenced objects and the row counts are read from the same state that the dump contains. A restore creates a
database. It never writes into an existing one, or next to files that SQLite would replay into it.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL, func, inspect, make_url, select, text
from sqlalchemy.orm import Session

from catalog import durable
from catalog.db import revisions
from catalog.db.database import BUSY_SECONDS, Database, read_clock
from catalog.db.errors import translated
from catalog.errors import Conflict, InvalidRequest
from catalog.maintenance.backup import integrity, references
from catalog.maintenance.backup.references import Keys
from catalog.tables.audit import AuditHead

DEBIAN = Path("/usr/lib/postgresql")
INSTALL_NEWER = (
    "Install a later version of PostgreSQL's client programs, at least the server's version, then try again."
)
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TZ")
"""Environment variables that are passed to PostgreSQL's programs, in addition to its own (PG…)."""
SIDE_FILES = ("-wal", "-shm", "-journal")
"""Suffixes of the files that SQLite keeps next to a database. It replays a log into any database file with the matching
name, even into another database."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The state of the database that the dump contains."""

    taken_at: float
    """Seconds since 1970 by the database's clock."""
    revision: str
    """Alembic revision of the tables."""
    row_counts: dict[str, int]
    """Number of rows by table."""
    keys: Keys
    audit_link: int
    audit_digest: str
    """Head of the audit chain: link 0 and an empty digest if no event was sealed."""


def kind_of(url: str) -> str:
    """Return "sqlite" or "postgresql"."""
    return make_url(url).get_backend_name()


def take(db: Database, into: Path) -> Snapshot:
    """Dump one state of the database to `into` without blocking writers. Raises InvalidRequest, Unavailable."""
    return _sqlite_take(db, into) if db.is_sqlite else _postgresql_take(db, into)


def restore(dump: Path, url: str) -> None:
    """Restore the dump atomically into the database at `url`, which must have no tables."""
    if kind_of(url) == "sqlite":
        _sqlite_restore(dump, Path(make_url(url).database or ""))
    else:
        _run("pg_restore", make_url(url), ["--single-transaction", "--exit-on-error", str(dump)])
        _analyze(url)


def check_empty(url: str) -> None:
    """Raise Conflict if the database has tables, or if files of a SQLite database exist at its path."""
    parsed = make_url(url)
    if kind_of(url) == "sqlite":
        if parsed.database:
            _check_no_files(Path(parsed.database))
        return
    db = Database(url)
    try:
        with translated(), db.engine.connect() as connection:
            names = inspect(connection).get_table_names()
    finally:
        db.close()
    if names:
        tables = f"table {names[0]}" if len(names) == 1 else f"{len(names)} tables, such as {names[0]}"
        raise Conflict(
            f"The database {parsed.render_as_string()} already contains {tables}, and a restore never overwrites data.",
            code="database_not_empty",
            remedy="Set LORRY_DATABASE_URL to an empty database, then restore again.",
        )


def _check_no_files(path: Path) -> None:
    """Raise Conflict if the database file or one of its side files exists. The message lists them."""
    names = [str(path), *(f"{path}{suffix}" for suffix in SIDE_FILES)]
    if found := [name for name in names if os.path.lexists(name)]:
        is_one, files = len(found) == 1, ", ".join(found)
        moved = "the file" if is_one else "all of the files"
        raise Conflict(
            f"The database file {files} already exists, and a restore never overwrites data."
            if is_one
            else f"These database files already exist, and a restore never overwrites data: {files}.",
            code="database_not_empty",
            remedy=f"If a service uses this database, stop it. Move {moved} to "
            "another folder, or set LORRY_DATABASE_URL to a new path (sqlite:////PATH). Then restore again.",
        )


def _sqlite_take(db: Database, into: Path) -> Snapshot:
    """Dump a SQLite database.

    Copies all pages in one step, in a read transaction: it blocks no writer, and writes don't restart it.
    """
    path = str(db.engine.url.database)
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as source, closing(sqlite3.connect(into)) as copy:
        source.backup(copy)
    copied = Database(URL.create("sqlite", database=str(into)).render_as_string())
    try:
        with copied.read() as session:
            snapshot = _read_snapshot(session)
    finally:
        copied.close()
    with closing(sqlite3.connect(into)) as copy:
        copy.execute("PRAGMA journal_mode=DELETE")  # a single file without a log file
        found = copy.execute("PRAGMA integrity_check").fetchone()
    if found != ("ok",):
        raise integrity.refusal(str(found[0]), db.engine.url)
    return snapshot


def _postgresql_take(db: Database, into: Path) -> Snapshot:
    """Dump a PostgreSQL database. pg_dump reads this transaction's snapshot, so it stays open until pg_dump exits."""
    frozen = db.engine.execution_options(isolation_level="REPEATABLE READ")
    with translated(), Session(frozen) as session, session.begin():
        session.execute(text("set local idle_in_transaction_session_timeout = 0"))
        name = str(session.scalar(select(func.pg_export_snapshot())))
        snapshot = _read_snapshot(session)
        excluded = [_exclusion(name) for name in integrity.foreign_relations(session.connection())]
        options = ["--format=custom", f"--snapshot={name}", f"--file={into}", *excluded]
        _run("pg_dump", db.engine.url, options)
    return snapshot


def _exclusion(relation: str) -> str:
    """The pg_dump option that excludes a relation. Quotes keep pg_dump from interpreting the name as a pattern."""
    quoted = relation.replace('"', '""')
    return f'--exclude-table="{quoted}"'


def _read_snapshot(session: Session) -> Snapshot:
    head = session.get(AuditHead, 1)
    return Snapshot(
        taken_at=read_clock(session),
        revision=str(revisions.read(session)),
        row_counts=integrity.row_counts(session),
        keys=references.named(session),
        audit_link=head.link if head is not None else 0,
        audit_digest=head.digest if head is not None else "",
    )


def _sqlite_restore(dump: Path, path: Path) -> None:
    """Restore a SQLite database.

    The file appears under its name only after its content is synced to disk. It never overwrites the database of a
    service that was started in the meantime.
    """
    durable.make_folder(path.parent)
    draft = path.with_name(f".{path.name}-restored")
    draft.unlink(missing_ok=True)  # a draft left by a killed restore may be a hard link to a live database
    try:
        shutil.copyfile(dump, draft)
        durable.sync(draft)
        _check_no_files(path)
        os.link(draft, path)
    except FileExistsError:
        _check_no_files(path)
        raise
    finally:
        draft.unlink(missing_ok=True)
    durable.sync(path.parent)


def _analyze(url: str) -> None:
    """Run ANALYZE: a dump has no statistics, and without them PostgreSQL plans as if all tables were small."""
    db = Database(url)
    try:
        with translated(), db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("analyze")
    finally:
        db.close()


def program(name: str) -> Path | None:
    """Find a PostgreSQL program: on PATH, or else the newest of the versions that Debian installs side by side."""
    if found := shutil.which(name):
        return Path(found)
    kept = sorted(DEBIAN.glob(f"*/bin/{name}"), key=lambda path: float(path.parts[-3]))
    return kept[-1] if kept else None


def _run(name: str, url: URL, options: Sequence[str]) -> None:
    """Run a PostgreSQL program. Raises InvalidRequest.

    The URL's password is passed in the environment, because all users of the machine can read command lines.
    """
    found = program(name)
    if found is None:
        raise InvalidRequest(
            f"{name} is not installed. It is required to back up or restore a PostgreSQL database.",
            code="pg_dump_missing",
            remedy="Install the PostgreSQL client programs (Debian package: postgresql-client) in the server's version "
            "or later, or copy the database manually as described in docs/how-to/back-up-and-restore.md.",
        )
    query = dict(url.query)
    password = query.pop("password", url.password)
    if "sslpassword" in query:
        raise InvalidRequest(
            f"LORRY_DATABASE_URL contains 'sslpassword', which all users on this machine could read on {name}'s "
            "command line.",
            code="secret_on_command_line",
            remedy="Remove 'sslpassword', and use a client key file that has no password and that only this user can "
            "read.",
        )
    address = URL.create(
        "postgresql", username=url.username, host=url.host, port=url.port, database=url.database, query=query
    ).render_as_string()
    passed = {key: value for key, value in os.environ.items() if key in PASSED_ON or key.startswith("PG")}
    if password:
        passed["PGPASSWORD"] = str(password)
    argv = [str(found), f"--dbname={address}", "--no-owner", "--no-privileges", "--no-password", *options]
    done = subprocess.run(argv, env=passed, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        kept = "No backup was created." if name == "pg_dump" else "The database was not changed."
        is_mismatch = "server version mismatch" in done.stderr or "unsupported version" in done.stderr
        reported = _reported(name, done)
        raise InvalidRequest(
            f"{found} failed: {reported}. {kept}",
            code="pg_dump_failed",
            remedy=INSTALL_NEWER if is_mismatch else "Correct the reported problem, then try again.",
        )


def _reported(name: str, done: subprocess.CompletedProcess[str]) -> str:
    """Return the errors that a PostgreSQL program reported, without the SQL and the hints after them."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    prefix = f"{name}: error: "
    errors = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)] or lines[-1:]
    return "; ".join(errors).rstrip(".") or f"exit status {done.returncode}"
