"""Migrations lose no row and no value, on the way up and on the way down.

The rows are generated from the reflected tables, so a new migration is covered without a change here. A migration that
changes existing values on purpose is listed in INTENDED_CHANGES. The migration of tests/next_migration.py is tested
too. Other tests check that a migration that loses something is found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from sqlalchemy import JSON, Boolean, Column, Connection, Float, Integer, LargeBinary, MetaData, Table, insert, select
from sqlalchemy.types import TypeEngine

from catalog.db import revisions
from catalog.db.database import Database
from catalog.db.revisions import alembic_config
from tests import next_migration
from tests.next_migration import NEXT

pytestmark = pytest.mark.both_databases

INTENDED_CHANGES: set[tuple[str, str, str]] = set()
"""Step, table and column of each value that a migration changes on purpose; another test checks the result.

A step is `up to REVISION` or `down to REVISION`.
"""
CLEARED: set[tuple[str, str]] = set()
"""Step and table of rows that a migration deletes on purpose."""
LOSSES = {
    "a row": (
        "op.execute(\"delete from tallies where label like '%-1'\")",
        "pass",
        f"up to {NEXT}: rows of tallies are gone",
    ),
    "a value": (
        "op.execute(\"update organizations set created_by = 'x'\")",
        "pass",
        rf"up to {NEXT}: organizations\.created_by was .*, and is 'x'",
    ),
    "a value on the way down": ("pass", "op.execute('update gangs set size = 0')", r"gangs\.size was .*, and is 0"),
    "a column on the way down": (
        "op.add_column('gangs', sa.Column('color', sa.Text()))",
        "pass",
        "has other columns on the way down",
    ),
}
"""Upgrade statement, downgrade statement and expected error."""
Rows = dict[tuple[Any, ...], dict[str, Any]]
"""Rows by primary key."""


@dataclass(kw_only=True)
class Kept:
    """The written rows by table, and the columns of each revision."""

    rows: dict[str, Rows] = field(default_factory=dict[str, Rows])
    columns: dict[str, dict[str, list[str]]] = field(default_factory=dict[str, dict[str, list[str]]])


@pytest.fixture
def migrating(empty_url: str) -> Iterator[Database]:
    database = Database(empty_url)
    yield database
    database.close()


def test_upgrades_and_downgrades_lose_no_row_and_no_value(migrating: Database) -> None:
    _walk_up_and_down(migrating)


def test_migration_that_adds_and_recreates_tables_loses_nothing(migrating: Database, next_migration: Path) -> None:
    assert revisions.newest() == NEXT

    _walk_up_and_down(migrating)


@pytest.mark.slow_repetitions
@pytest.mark.parametrize(("upgrade", "downgrade", "found"), LOSSES.values(), ids=LOSSES)
def test_migration_that_loses_data_is_found(
    migrating: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upgrade: str, downgrade: str, found: str
) -> None:
    next_migration.install(tmp_path / "scripts", monkeypatch, upgrade=f"    {upgrade}", downgrade=f"    {downgrade}")

    with pytest.raises(AssertionError, match=found):
        _walk_up_and_down(migrating)


def _walk_up_and_down(database: Database) -> None:
    """Migrate up to every revision, add rows at each, and migrate down again. Raises AssertionError on lost data."""
    known = revisions.known()
    kept = Kept()
    for ordinal, revision in enumerate(known, 1):
        database.migrate(revision)
        tables = _check(database, kept, f"up to {revision}")
        kept.columns[revision] = _column_names(tables)
        _fill(database, kept, tables, ordinal)
    for revision in reversed(known[:-1]):
        command.downgrade(alembic_config(database.url), revision)
        tables = _check(database, kept, f"down to {revision}")
        assert _column_names(tables) == kept.columns[revision], f"{revision} has other columns on the way down"
    command.downgrade(alembic_config(database.url), "base")


def _tables(connection: Connection) -> list[Table]:
    """Return the current tables, each after the tables that it references."""
    metadata = MetaData()
    metadata.reflect(connection)
    return [table for table in metadata.sorted_tables if table.name != "alembic_version"]


def _check(database: Database, kept: Kept, step: str) -> list[Table]:
    """Check that all earlier rows exist with the values of all remaining columns. Returns the tables."""
    with database.schema_connection() as connection:
        tables = _tables(connection)
        for table in tables:
            found = _read(connection, table)
            before = {} if (step, table.name) in CLEARED else kept.rows.get(table.name, {})
            assert before.keys() <= found.keys(), f"{step}: rows of {table.name} are gone"
            for key, row in before.items():
                for name in row.keys() & found[key].keys():
                    is_kept = found[key][name] == row[name] or (step, table.name, name) in INTENDED_CHANGES
                    assert is_kept, f"{step}: {table.name}.{name} was {row[name]!r}, and is {found[key][name]!r}"
            kept.rows[table.name] = found
    for name in kept.rows.keys() - {table.name for table in tables}:
        del kept.rows[name]
    return tables


def _fill(database: Database, kept: Kept, tables: list[Table], ordinal: int) -> None:
    """Add two rows to every table: one with all columns, and one that leaves nullable columns empty."""
    made: dict[str, list[dict[str, Any]]] = {}
    with database.schema_connection() as connection:
        for table in tables:
            made[table.name] = [_row(table, made, ordinal, number) for number in (0, 1)]
            for row in made[table.name]:
                connection.execute(insert(table).values(row))
            kept.rows[table.name] = _read(connection, table)


def _row(table: Table, made: dict[str, list[dict[str, Any]]], ordinal: int, number: int) -> dict[str, Any]:
    return {
        column.name: _value(column, made, f"{ordinal}-{number}", ordinal * 10 + number)
        for column in table.columns
        if number == 0 or not column.nullable or column.primary_key
    }


def _value(column: Column[Any], made: dict[str, list[dict[str, Any]]], mark: str, number: int) -> Any:
    for key in column.foreign_keys:
        referred = made.get(key.column.table.name)
        if referred:
            return referred[number % 10][key.column.name]
    return _of_type(column.type, f"{column.name}-{mark}", number)


def _of_type(kind: TypeEngine[Any], text: str, number: int) -> Any:
    if isinstance(kind, JSON):
        return {"text": text, "numbers": [number, number + 0.5, None]}
    if isinstance(kind, Boolean):
        return number % 2 == 0
    if isinstance(kind, Float):
        return number + 0.25
    if isinstance(kind, Integer):
        return number
    if isinstance(kind, LargeBinary):
        return text.encode()
    length: int | None = getattr(kind, "length", None)
    return text if length is None else text[-length:]


def _read(connection: Connection, table: Table) -> Rows:
    rows = connection.execute(select(table)).mappings()
    return {tuple(row[column.name] for column in table.primary_key): dict(row) for row in rows}


def _column_names(tables: list[Table]) -> dict[str, list[str]]:
    return {table.name: sorted(column.name for column in table.columns) for table in tables}
