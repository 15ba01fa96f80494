"""Checks the integrity of a database: its structure, its foreign keys, and the row counts that a backup recorded.

SQLite has its own checks. For PostgreSQL, every row is read, and every foreign key is compared with the rows that it
refers to.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

from sqlalchemy import URL, Connection, column, func, inspect, quoted_name, select, table, text
from sqlalchemy.exc import DatabaseError, InternalError
from sqlalchemy.orm import Session

from catalog.db import revisions
from catalog.db.database import Database
from catalog.db.errors import translated
from catalog.errors import Conflict

NO_DATABASE = "file is not a database"
"""SQLite reports it for a damaged first page, and for a file that never was a database."""
INVALID_INDEXES = """
    select cls.relname from pg_index idx join pg_class cls on cls.oid = idx.indexrelid
    where cls.relnamespace = current_schema()::regnamespace and not idx.indisvalid
    and cls.relowner = (select relowner from pg_class where oid = 'alembic_version'::regclass)
    order by cls.relname
"""
FOREIGN_RELATIONS = """
    select cls.relname from pg_class cls
    where cls.relnamespace = current_schema()::regnamespace and cls.relkind in ('r', 'p', 'v', 'm', 'f', 'S')
    and cls.relowner <> (select relowner from pg_class where oid = 'alembic_version'::regclass)
    order by cls.relname
"""


def row_counts(session: Session) -> dict[str, int]:
    """Return the number of rows of each of Lorry's tables, including alembic's."""
    names = _table_names(session.connection())
    return {name: session.scalar(select(func.count()).select_from(table(name))) or 0 for name in names}


def foreign_relations(connection: Connection) -> list[str]:
    """Return the tables, views and sequences in the schema whose owner differs from that of Lorry's tables.

    The role of this process may not be allowed to read them.
    """
    return [] if connection.dialect.name == "sqlite" else list(connection.scalars(text(FOREIGN_RELATIONS)))


def damage(db: Database) -> list[str]:
    """Return sentences about unreadable pages, rows and indexes. If there are any, no other result can be trusted.

    Reads the whole database. Raises Unavailable.
    """
    try:
        with translated(), db.engine.connect() as connection:
            found = _sqlite_damage(connection) if db.is_sqlite else _postgresql_damage(connection)
    except DatabaseError as error:
        if not _means_damage(error):
            raise
        found = [str(error.orig)]
    return [f"The database is damaged: {_one_line(problem)}." for problem in found]


def orphans(db: Database) -> list[str]:
    """Return sentences about rows that refer to missing rows. Raises Unavailable."""
    with translated(), db.engine.connect() as connection:
        found = _sqlite_orphans(connection) if db.is_sqlite else _postgresql_orphans(connection)
    return [_orphan_sentence(child, parent, number) for (child, parent), number in sorted(found.items())]


def differences(db: Database, *, recorded_revision: str, recorded_counts: Mapping[str, int]) -> list[str]:
    """Return sentences about differences from a backup's record."""
    with db.read() as session:
        found_revision, found = revisions.read(session), row_counts(session)
    problems: list[str] = []
    if found_revision != recorded_revision:
        problems.append(f"The tables have revision {found_revision}, but the backup recorded {recorded_revision}.")
    for name in sorted({*found, *recorded_counts}):
        expected = recorded_counts.get(name, 0)
        if (count := found.get(name, 0)) != expected:
            rows = "1 row" if count == 1 else f"{count:,} rows"
            problems.append(f"Table {name} has {rows}, but the backup recorded {expected:,}.")
    return problems


@contextmanager
def damage_refused(url: URL) -> Generator[None]:
    """Raise Conflict if the database at `url`, from which the block reads, reports damage."""
    try:
        yield
    except DatabaseError as error:
        if not _means_damage(error):
            raise
        raise refusal(str(error.orig), url) from error


def refusal(problem: str, url: URL) -> Conflict:
    """Return the error of a command that can't work with a damaged database."""
    name, location = url.database, url.render_as_string()
    reason = _one_line(problem)
    return Conflict(
        ("sqlite_database_damaged_or_wrong" if NO_DATABASE in problem else "sqlite_database_damaged")
        if url.get_backend_name() == "sqlite"
        else "postgresql_database_damaged",
        location=location,
        reason=reason,
        name=str(name),
    )


def _means_damage(error: DatabaseError) -> bool:
    """Whether the error reports a damaged database.

    SQLite reports a malformed file as the base class itself, PostgreSQL as an error of its class XX.
    """
    return type(error) is DatabaseError or isinstance(error, InternalError)


def _one_line(problem: str) -> str:
    """Return a database's text on one line, without the period at its end."""
    return " ".join(problem.split()).rstrip(".")


def _table_names(connection: Connection) -> list[str]:
    foreign = set(foreign_relations(connection))
    return [name for name in inspect(connection).get_table_names() if name not in foreign]


def _sqlite_damage(connection: Connection) -> list[str]:
    found = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA integrity_check")]
    return [] if found == ["ok"] else found


def _sqlite_orphans(connection: Connection) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for child, _, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
        found[child, parent] = found.get((child, parent), 0) + 1
    return found


def _postgresql_damage(connection: Connection) -> list[str]:
    """Read every row and check the indexes. Rows are cast to text, so that out-of-line values are read too."""
    for name in _table_names(connection):
        whole_row = text(f"length({connection.dialect.identifier_preparer.quote(name)}::text)")
        connection.execute(select(func.count(whole_row)).select_from(table(name)))
    return [f"the index {name} is not valid" for name in connection.scalars(text(INVALID_INDEXES))]


def _postgresql_orphans(connection: Connection) -> dict[tuple[str, str], int]:
    inspector = inspect(connection)
    found: dict[tuple[str, str], int] = {}
    for name in _table_names(connection):
        for key in inspector.get_foreign_keys(name):
            child_columns, parent_columns = key["constrained_columns"], key["referred_columns"]
            child = table(name, *map(column, child_columns)).alias("child")
            parent = table(quoted_name(key["referred_table"], quote=None), *map(column, parent_columns)).alias("parent")
            pairs = list(zip(child_columns, parent_columns, strict=True))
            matching = select(1).where(
                *(parent.c[parent_column] == child.c[child_column] for child_column, parent_column in pairs)
            )
            refers = [child.c[child_column].is_not(None) for child_column in child_columns]
            number = connection.scalar(select(func.count()).select_from(child).where(*refers, ~matching.exists()))
            if number:
                found[name, key["referred_table"]] = found.get((name, key["referred_table"]), 0) + number
    return found


def _orphan_sentence(child: str, parent: str, number: int) -> str:
    rows = "1 row that refers" if number == 1 else f"{number:,} rows that refer"
    return f"Table {child} has {rows} to a missing row of {parent}."
