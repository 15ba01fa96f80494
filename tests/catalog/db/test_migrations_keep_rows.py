"""No migration loses a row or a value: rows of every table at every revision, up through all of them and down again.

The rows are made from the tables as they are reflected, so that a new migration is held to this without a word here;
one that means to change what was there says so in MEANT. The migration of tests/next_migration.py is held to it too,
and one that loses something is found.
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

MEANT: set[tuple[str, str, str]] = set()
"""By step, table and column: what a migration changes on purpose, where another test holds what it becomes. A step is
`up to REVISION` or `down to REVISION`."""
CLEARED: set[tuple[str, str]] = set()
"""By step and table: rows that a migration deletes on purpose."""
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
"""Up, down, and what is found of them."""
Rows = dict[tuple[Any, ...], dict[str, Any]]
"""By primary key."""


@dataclass(kw_only=True)
class Kept:
    """What was written, by table, and the columns that each revision has."""

    rows: dict[str, Rows] = field(default_factory=dict[str, Rows])
    columns: dict[str, dict[str, list[str]]] = field(default_factory=dict[str, dict[str, list[str]]])


@pytest.fixture
def migrating(empty_url: str) -> Iterator[Database]:
    database = Database(empty_url)
    yield database
    database.close()


def test_no_row_and_no_value_is_lost_on_the_way_up_nor_on_the_way_down(migrating: Database) -> None:
    _walk_up_and_down(migrating)


def test_nor_by_a_migration_that_adds_and_makes_a_table_anew(migrating: Database, next_migration: Path) -> None:
    assert revisions.newest() == NEXT

    _walk_up_and_down(migrating)


@pytest.mark.slow_repetitions
@pytest.mark.parametrize(("upgrade", "downgrade", "found"), LOSSES.values(), ids=LOSSES)
def test_a_migration_that_loses_something_is_found(
    migrating: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upgrade: str, downgrade: str, found: str
) -> None:
    next_migration.install(tmp_path / "scripts", monkeypatch, upgrade=f"    {upgrade}", downgrade=f"    {downgrade}")

    with pytest.raises(AssertionError, match=found):
        _walk_up_and_down(migrating)


def _walk_up_and_down(database: Database) -> None:
    """To every revision, with more rows at each on the way up. Raises AssertionError where a row or a value is lost."""
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
    """Those that there are now, each after those that it refers to."""
    metadata = MetaData()
    metadata.reflect(connection)
    return [table for table in metadata.sorted_tables if table.name != "alembic_version"]


def _check(database: Database, kept: Kept, step: str) -> list[Table]:
    """Every row that was there is, with the values of all columns that are still known. Returns the tables."""
    with database.schema_connection() as connection:
        tables = _tables(connection)
        for table in tables:
            found = _read(connection, table)
            before = {} if (step, table.name) in CLEARED else kept.rows.get(table.name, {})
            assert before.keys() <= found.keys(), f"{step}: rows of {table.name} are gone"
            for key, row in before.items():
                for name in row.keys() & found[key].keys():
                    is_kept = found[key][name] == row[name] or (step, table.name, name) in MEANT
                    assert is_kept, f"{step}: {table.name}.{name} was {row[name]!r}, and is {found[key][name]!r}"
            kept.rows[table.name] = found
    for name in kept.rows.keys() - {table.name for table in tables}:
        del kept.rows[name]
    return tables


def _fill(database: Database, kept: Kept, tables: list[Table], ordinal: int) -> None:
    """Two rows more in every table: one with all its columns, and one with nothing in those that may be empty."""
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
