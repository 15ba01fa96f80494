"""The database as one file, and back: SQLite's online backup, PostgreSQL's pg_dump and pg_restore.

Beside catalog/db.py the only file that knows the two apart. What a dump names is read from the state that it holds.
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

from catalog.backup import holdings
from catalog.backup.holdings import Keys
from catalog.db import BUSY_SECONDS, Database, read_clock
from catalog.errors import Conflict, InvalidRequest, LorryError
from catalog.outages import translated
from catalog.tables import AuditHead

DEBIAN = Path("/usr/lib/postgresql")
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TZ")
"""Variables that PostgreSQL's programs see, beside its own, PG…."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """What the record said at the moment of which the dump is."""

    taken_at: float
    """Seconds since 1970 by the database's clock."""
    revision: str
    """Of the tables, by alembic."""
    keys: Keys
    audit_link: int
    audit_digest: str
    """Where the audit chain ended; 0 and empty where nothing was sealed."""


def kind_of(url: str) -> str:
    """sqlite or postgresql."""
    return make_url(url).get_backend_name()


def take(db: Database, into: Path) -> Snapshot:
    """Write one state of the database to `into`, while others write on. Raises InvalidRequest, Unavailable."""
    return _sqlite_take(db, into) if db.is_sqlite else _postgresql_take(db, into)


def put_back(dump: Path, url: str) -> None:
    """Make the database at `url`, which must have no tables, what it was: whole or not at all."""
    if kind_of(url) == "sqlite":
        _sqlite_put_back(dump, Path(make_url(url).database or ""))
    else:
        _run("pg_restore", make_url(url), ["--single-transaction", "--exit-on-error", str(dump)])
        _analyse(url)


def check_empty(url: str) -> None:
    """Raises Conflict where something is there already."""
    parsed = make_url(url)
    if kind_of(url) == "sqlite":
        is_there = bool(parsed.database) and Path(parsed.database or "").exists()
    else:
        db = Database(url)
        try:
            with translated(), db.engine.connect() as connection:
                is_there = bool(inspect(connection).get_table_names())
        finally:
            db.close()
    if is_there:
        raise Conflict(
            f"There is something at {parsed.render_as_string()} already.",
            code="database_not_empty",
            remedy="Name an empty database by LORRY_DATABASE_URL, or another data folder by LORRY_DATA_DIR. "
            "A backup is never put over what is there.",
        )


def _sqlite_take(db: Database, into: Path) -> Snapshot:
    """All pages in one step: a reader's transaction, which keeps no writer waiting, and which none makes begin anew."""
    path = str(db.engine.url.database)
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as source, closing(sqlite3.connect(into)) as copy:
        source.backup(copy)
    copied = Database(URL.create("sqlite", database=str(into)).render_as_string())
    try:
        with copied.read() as session:
            snapshot = _look(session)
    finally:
        copied.close()
    with closing(sqlite3.connect(into)) as copy:
        copy.execute("PRAGMA journal_mode=DELETE")  # one file, and not one with a log beside it
        found = copy.execute("PRAGMA integrity_check").fetchone()
    if found != ("ok",):
        raise _damaged(str(found[0]))
    return snapshot


def _postgresql_take(db: Database, into: Path) -> Snapshot:
    """pg_dump reads what this transaction sees, so it is open until that has ended: as pg_dump's own is."""
    frozen = db.engine.execution_options(isolation_level="REPEATABLE READ")
    with translated(), Session(frozen) as session, session.begin():
        session.execute(text("set local idle_in_transaction_session_timeout = 0"))
        name = str(session.scalar(select(func.pg_export_snapshot())))
        snapshot = _look(session)
        _run("pg_dump", db.engine.url, ["--format=custom", f"--snapshot={name}", f"--file={into}"])
    return snapshot


def _look(session: Session) -> Snapshot:
    head = session.get(AuditHead, 1)
    return Snapshot(
        taken_at=read_clock(session),
        revision=str(session.scalar(text("select version_num from alembic_version"))),
        keys=holdings.named(session),
        audit_link=head.link if head is not None else 0,
        audit_digest=head.digest if head is not None else "",
    )


def _sqlite_put_back(dump: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}-restored")
    shutil.copyfile(dump, draft)
    with draft.open("rb+") as file:
        os.fsync(file.fileno())
    draft.rename(path)


def _analyse(url: str) -> None:
    """A dump has no statistics, without which PostgreSQL plans as if all tables were small."""
    db = Database(url)
    try:
        with translated(), db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("analyze")
    finally:
        db.close()


def program(name: str) -> Path | None:
    """One of PostgreSQL's: on PATH, else the newest where Debian keeps several."""
    if found := shutil.which(name):
        return Path(found)
    kept = sorted(DEBIAN.glob(f"*/bin/{name}"), key=lambda path: float(path.parts[-3]))
    return kept[-1] if kept else None


def _run(name: str, url: URL, options: Sequence[str]) -> None:
    """With the password in the environment: a command line can be read by everybody on the machine."""
    found = program(name)
    if found is None:
        raise InvalidRequest(
            f"{name} is not on this machine, and a PostgreSQL database is copied by it alone.",
            code="pg_dump_missing",
            remedy="Install PostgreSQL's client programs, of the server's version or later (Debian: "
            "postgresql-client), or copy by hand as docs/OPERATIONS.md says.",
        )
    address = URL.create(
        "postgresql",
        username=url.username,
        host=url.host,
        port=url.port,
        database=url.database,
        query=url.query,
    ).render_as_string(hide_password=False)
    passed = {key: value for key, value in os.environ.items() if key in PASSED_ON or key.startswith("PG")}
    if url.password:
        passed["PGPASSWORD"] = str(url.password)
    argv = [str(found), f"--dbname={address}", "--no-owner", "--no-privileges", "--no-password", *options]
    done = subprocess.run(argv, env=passed, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}"
        raise InvalidRequest(
            f"{name} did not copy the database: {said}",
            code="pg_dump_failed",
            remedy="Nothing was kept. Do what it says, then try again.",
        )


def _damaged(what: str) -> LorryError:
    return Conflict(
        f"The database is damaged: {what}",
        code="database_damaged",
        remedy="Keep its file, and restore an earlier backup beside it.",
    )
