"""No migration loses a row or a value: rows of every table at every revision, up through all of them and down again.

The rows are made from the tables as they are reflected, so that a new migration is held to this without a word here;
one that means to change what was there says so in MEANT.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import JSON, Boolean, Column, Connection, Float, Integer, LargeBinary, MetaData, Table, insert, select
from sqlalchemy.types import TypeEngine

from catalog.db.database import Database, alembic_config
from catalog.history.metric_points import Point, pack

SEALS = ("link", "previous", "digest")
MEANT = {
    ("down to 0007", "api_keys", "revoked_at"),
    ("down to 0050", "stored_bytes", "num_bytes"),
    *((step, "audit_events", name) for step in ("up to 0053", "down to 0052") for name in SEALS),
}
"""By step, table and column: what a migration changes on purpose, where another test holds what it becomes."""
CLEARED = {("up to 0053", "audit_head"), ("down to 0052", "audit_head")}
"""Tables whose rows a migration deletes on purpose: the API server seals the audit log again."""
BEFORE_ORGANIZATIONS = "0029"
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
    revisions = _revisions(migrating.url)
    kept = Kept()

    for revision in revisions:
        migrating.migrate(revision)
        tables = _check(migrating, kept, f"up to {revision}")
        kept.columns[revision] = _column_names(tables)
        _fill(migrating, kept, tables, revision)
    for revision in reversed(revisions[:-1]):
        if revision == BEFORE_ORGANIZATIONS:
            _leave_one_organization(migrating)
        command.downgrade(alembic_config(migrating.url), revision)
        tables = _check(migrating, kept, f"down to {revision}")
        assert _column_names(tables) == kept.columns[revision], f"{revision} has other columns on the way down"
    command.downgrade(alembic_config(migrating.url), "base")


def _leave_one_organization(database: Database) -> None:
    """Several are no way back."""
    with database.schema_connection() as connection:
        connection.exec_driver_sql("update projects set organization_id = (select min(id) from organizations)")
        connection.exec_driver_sql("delete from organizations where id > (select min(id) from organizations)")


def _revisions(url: str) -> list[str]:
    """Oldest first."""
    scripts = ScriptDirectory.from_config(alembic_config(url)).walk_revisions()
    return [script.revision for script in scripts][::-1]


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


def _fill(database: Database, kept: Kept, tables: list[Table], revision: str) -> None:
    """Two rows more in every table: one with all its columns, and one with nothing in those that may be empty."""
    made: dict[str, list[dict[str, Any]]] = {}
    with database.schema_connection() as connection:
        for table in tables:
            made[table.name] = [_row(table, made, revision, number) for number in (0, 1)]
            for row in made[table.name]:
                connection.execute(insert(table).values(row))
            kept.rows[table.name] = _read(connection, table)


def _row(table: Table, made: dict[str, list[dict[str, Any]]], revision: str, number: int) -> dict[str, Any]:
    return {
        column.name: _value(column, made, f"{revision}-{number}", int(revision) * 10 + number)
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
    if isinstance(kind, LargeBinary):  # nothing but points of curves, which a migration reads
        return pack([Point(kind="train", step=number, seq=number, created_at=0.5, loss=1.5)])
    length: int | None = getattr(kind, "length", None)
    return text if length is None else text[-length:]


def _read(connection: Connection, table: Table) -> Rows:
    rows = connection.execute(select(table)).mappings()
    return {tuple(row[column.name] for column in table.primary_key): dict(row) for row in rows}


def _column_names(tables: list[Table]) -> dict[str, list[str]]:
    return {table.name: sorted(column.name for column in table.columns) for table in tables}
