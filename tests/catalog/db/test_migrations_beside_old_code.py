"""Migrations after the first only add, as docs/how-to/upgrade.md promises.

Processes of the previous version therefore keep working with the new tables. A removal follows one release later and is
listed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Column, MetaData, Table

from catalog.db import revisions
from catalog.db.database import Database
from tests import next_migration
from tests.next_migration import NEXT

pytestmark = pytest.mark.both_databases

TAKEN_AWAY: set[str] = set()
"""Entries `REVISION TABLE` or `REVISION TABLE.COLUMN` that the previous release already no longer uses."""
IN_THE_WAY = {
    "a table is dropped": ("op.drop_table('gang_seats')", ["gang_seats"]),
    "a table is renamed": ("op.rename_table('gangs', 'crews')", ["gangs"]),
    "a column is dropped": ("op.drop_column('gangs', 'port')", ["gangs.port"]),
    "a column is renamed": ("op.alter_column('gangs', 'port', new_column_name='door')", ["gangs.port"]),
    "every row must have a new column": (
        "with op.batch_alter_table('gangs') as batch: batch.add_column(sa.Column('color', sa.Text(), nullable=False))",
        ["gangs.color"],
    ),
    "every row must have an old column": (
        "with op.batch_alter_table('gangs') as batch: batch.alter_column('port', nullable=False)",
        ["gangs.port"],
    ),
    "a column loses its default": (
        "with op.batch_alter_table('gang_seats') as batch: batch.alter_column('num_failed', server_default=None)",
        ["gang_seats.num_failed"],
    ),
}


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'lorry.db'}")
    yield database
    database.close()


def test_old_code_can_read_and_write_the_current_tables(database: Database) -> None:
    assert set(_in_the_way(database)) == TAKEN_AWAY


def test_old_code_keeps_working_after_a_migration_that_only_adds(database: Database, next_migration: Path) -> None:
    assert revisions.newest() == NEXT
    assert set(_in_the_way(database)) == TAKEN_AWAY


@pytest.mark.slow_repetitions
@pytest.mark.parametrize(("upgrade", "places"), IN_THE_WAY.values(), ids=IN_THE_WAY)
def test_migration_that_breaks_old_code_is_found(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upgrade: str, places: list[str]
) -> None:
    next_migration.install(tmp_path / "scripts", monkeypatch, upgrade=f"    {upgrade}", downgrade="    pass")

    assert set(_in_the_way(database)) - TAKEN_AWAY == {f"{NEXT} {place}" for place in places}


def _in_the_way(db: Database) -> Iterator[str]:
    """Yield per revision the dropped tables and columns, and the columns of existing tables that became required."""
    before: dict[str, Table] = {}
    for revision in revisions.known():
        db.migrate(revision)
        now = _tables(db)
        for name, table in before.items():
            if name not in now:
                yield f"{revision} {name}"
                continue
            columns = now[name].columns
            yield from (f"{revision} {name}.{gone}" for gone in sorted(set(table.columns.keys()) - set(columns.keys())))
            for column in columns:
                was_demanded = column.name in table.columns and _is_demanded(table.columns[column.name])
                if _is_demanded(column) and not was_demanded:
                    yield f"{revision} {name}.{column.name}"
        before = now


def _tables(db: Database) -> dict[str, Table]:
    metadata = MetaData()
    metadata.reflect(db.engine)
    return {table.name: table for table in metadata.sorted_tables}


def _is_demanded(column: Column[object]) -> bool:
    return not column.nullable and column.server_default is None
