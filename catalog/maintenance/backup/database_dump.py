"""Dumps one state of the database to a SQLite file, whatever the database, and restores the file into either database.

SQLite copies its pages. PostgreSQL is read table by table, and filled with COPY. A restore creates a database. It never
writes into an existing one, or next to files that SQLite would replay into it.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import (
    JSON,
    URL,
    BigInteger,
    Connection,
    MetaData,
    Table,
    Text,
    cast,
    column,
    create_engine,
    func,
    inspect,
    make_url,
    select,
    text,
)
from sqlalchemy import table as table_named
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from catalog import disk
from catalog.db import revisions
from catalog.db.database import BUSY_SECONDS, Database, read_clock
from catalog.db.errors import translated
from catalog.errors import Conflict
from catalog.maintenance.backup import integrity, references
from catalog.maintenance.backup.references import Keys
from catalog.tables.tenancy import AuditHead

ROWS_AT_ONCE = 200
"""Rows that are held in memory: some contain JSON of a megabyte."""
SIDE_FILES = ("-wal", "-shm", "-journal")
"""Suffixes of the files that SQLite keeps next to a database. It replays a log into any database file with the matching
name, even into another database."""
NUMBERED = """
    select seq.oid::regclass::text, tab.relname, att.attname
    from pg_class seq
    join pg_depend dep on dep.objid = seq.oid and dep.classid = 'pg_class'::regclass and dep.deptype in ('a', 'i')
    join pg_class tab on tab.oid = dep.refobjid and dep.refclassid = 'pg_class'::regclass
    join pg_attribute att on att.attrelid = tab.oid and att.attnum = dep.refobjsubid
    where seq.relkind = 'S' and tab.relnamespace = current_schema()::regnamespace
"""
"""Selects each sequence with the column that it numbers."""


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


def take(db: Database, into: Path) -> Snapshot:
    """Dump one state of the database to the SQLite file `into` without blocking writers.

    Raises Conflict if the database is damaged, Unavailable and OutOfSpace.
    """
    with integrity.damage_refused(db.engine.url):
        with translated(), Session(db.engine) as session:
            taken_at = read_clock(session)
        if db.is_sqlite:
            _copy_pages(db, into)
        else:
            _copy_rows(db, into)
    with _opened(into) as copied, copied.read() as session:
        head = session.get(AuditHead, 1)
        snapshot = Snapshot(
            taken_at=taken_at,
            revision=str(revisions.read(session)),
            row_counts=integrity.row_counts(session),
            keys=references.named(session),
            audit_link=head.link if head is not None else 0,
            audit_digest=head.digest if head is not None else "",
        )
    with closing(sqlite3.connect(into)) as copy:
        copy.execute("PRAGMA journal_mode=DELETE")  # a single file without a log file
    return snapshot


def restore(dump: Path, url: str) -> None:
    """Restore the dump atomically into the database at `url`, which must have no tables.

    Raises Conflict if it has tables, or if PostgreSQL can't store a value of a SQLite database.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        _sqlite_restore(dump, Path(parsed.database or ""))
        return
    with _opened(dump) as copied, copied.read() as session:
        revision = str(revisions.read(session))
    db = Database(url)
    try:
        with translated(), db.schema_connection() as connection:
            _check_no_tables(connection, parsed)  # another process may have created some during the copy of objects
            revisions.upgrade(connection, url, revision)
            _fill(connection, dump)
        with translated(), db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("analyze")  # without statistics, PostgreSQL plans as if all tables were small
    finally:
        db.close()


def check_empty(url: str) -> None:
    """Raise Conflict if the database has tables, or if files of a SQLite database exist at its path."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        if parsed.database:
            _check_no_files(Path(parsed.database))
        return
    db = Database(url)
    try:
        with translated(), db.engine.connect() as connection:
            _check_no_tables(connection, parsed)
    finally:
        db.close()


def _check_no_tables(connection: Connection, url: URL) -> None:
    if names := inspect(connection).get_table_names():
        if len(names) == 1:
            raise Conflict("database_has_table", url=url.render_as_string(), names=names[0])
        raise Conflict("database_has_tables", url=url.render_as_string(), num_names=len(names), names=names[0])


def _check_no_files(path: Path) -> None:
    """Raise Conflict if the database file or one of its side files exists. The message lists them."""
    names = [str(path), *(f"{path}{suffix}" for suffix in SIDE_FILES)]
    if found := [name for name in names if os.path.lexists(name)]:
        is_one, files = len(found) == 1, ", ".join(found)
        raise Conflict("database_file_exists" if is_one else "database_files_exist", files=files)


def _copy_pages(db: Database, into: Path) -> None:
    """Copy all pages in one step, in a read transaction: it blocks no writer, and writes don't restart it.

    Raises Conflict if the pages are damaged.
    """
    path = str(db.engine.url.database)
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as source, closing(sqlite3.connect(into)) as copy:
        source.backup(copy)
    with _opened(into) as copied, copied.read() as session:
        found = session.scalar(text("PRAGMA integrity_check"))
    if found != "ok":
        raise integrity.refusal(str(found), db.engine.url)


def _copy_rows(db: Database, into: Path) -> None:
    """Copy the rows that one transaction sees into the same tables of SQLite."""
    frozen = db.engine.execution_options(isolation_level="REPEATABLE READ")
    with translated(), frozen.begin() as connection:
        connection.execute(text("set local idle_in_transaction_session_timeout = 0"))
        with _opened(into) as copied:
            copied.migrate(str(revisions.read(connection)))
        with closing(sqlite3.connect(into, isolation_level=None)) as copy:
            for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-200000"):  # a lost draft is made again
                copy.execute(f"PRAGMA {pragma}")
            copy.execute("begin")
            for table in _tables(into):
                # JSON as it is stored: a parsed value would not distinguish the value null from a missing one.
                columns = [cast(each, Text) if isinstance(each.type, JSON) else each for each in table.c]
                insert = str(table.insert().compile(dialect=sqlite.dialect()))
                found = connection.execute(select(*columns), execution_options={"yield_per": ROWS_AT_ONCE})
                for rows in found.partitions():
                    copy.executemany(insert, [tuple(row) for row in rows])
            copy.execute("commit")


def _fill(connection: Connection, dump: Path) -> None:
    """Copy the rows of the dump into the empty tables of PostgreSQL, and advance the sequences that number rows."""
    driver: Any = connection.connection.driver_connection
    with closing(sqlite3.connect(dump)) as source:
        for table in _tables(dump):
            names = ", ".join(f'"{each.name}"' for each in table.c)
            with _rejection(table.name), driver.cursor().copy(f"copy {table.name} ({names}) from stdin") as copy:
                for row in source.execute(str(select(table).compile(dialect=sqlite.dialect()))):
                    copy.write_row(row)
    for sequence, of_table, of_column in connection.execute(text(NUMBERED)).all():
        last = select(func.max(column(str(of_column), BigInteger()))).select_from(table_named(str(of_table)))
        connection.execute(select(func.setval(cast(sequence, postgresql.REGCLASS), last.scalar_subquery())))


@contextmanager
def _rejection(name: str) -> Generator[None]:
    """SQLite enforces neither the lengths nor the characters of texts."""
    try:
        yield
    except (psycopg.DataError, psycopg.IntegrityError) as error:
        detail = (error.diag.message_primary or str(error)).rstrip(".")
        if error.diag.context:
            raise Conflict("row_value_not_storable", name=name, detail=detail, context=error.diag.context) from error
        raise Conflict("row_not_storable", name=name, detail=detail) from error
    except psycopg.OperationalError as error:
        raise OperationalError("COPY", None, error) from error


def _tables(dump: Path) -> list[Table]:
    """Return the tables of the dump, each after the tables that it references. Alembic's is filled by the migration."""
    metadata, engine = MetaData(), create_engine(URL.create("sqlite", database=str(dump)))
    metadata.reflect(engine)
    engine.dispose()
    return [table for table in metadata.sorted_tables if table.name != revisions.VERSIONS.name]


@contextmanager
def _opened(dump: Path) -> Generator[Database]:
    db = Database(URL.create("sqlite", database=str(dump)).render_as_string())
    try:
        yield db
    finally:
        db.close()


def _sqlite_restore(dump: Path, path: Path) -> None:
    """Restore a SQLite database.

    The file appears under its name only after its content is synced to disk. It never overwrites the database of a
    service that was started in the meantime.
    """
    disk.make_folder(path.parent)
    draft = path.with_name(f".{path.name}-restored")
    draft.unlink(missing_ok=True)  # a draft left by a killed restore may be a hard link to a live database
    try:
        shutil.copyfile(dump, draft)
        disk.sync(draft)
        _check_no_files(path)
        os.link(draft, path)
    except FileExistsError:
        _check_no_files(path)
        raise
    finally:
        draft.unlink(missing_ok=True)
    disk.sync(path.parent)
