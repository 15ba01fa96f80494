"""What docs/UPGRADING.md promises: since the first release migrations only add, so that processes of the version before
go on beside the new tables. What takes something away comes a release later, and is named here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from alembic.script import ScriptDirectory
from sqlalchemy import Column, MetaData, Table

from catalog.db.database import Database, alembic_config

FIRST_RELEASE = "0035"
"""The newest revision of the time when nothing was released: of those up to it nobody runs old code."""
TAKEN_AWAY = {"0049 api_keys.request_digest"}
"""`REVISION TABLE.COLUMN`, where the release before has stopped to use it already, or was never published (0.1.0)."""


def test_old_code_can_still_read_and_write_what_newer_migrations_have_left(tmp_path: Path) -> None:
    found = list(_in_the_way(Database(f"sqlite:///{tmp_path / 'lorry.db'}")))

    assert [place for place in found if place.split()[0] > FIRST_RELEASE] == sorted(TAKEN_AWAY)
    assert "0018 metrics" in found, "what was taken away before is seen"
    assert "0030 projects.organization_id" in found, "what old code would not have filled in is seen"


def _in_the_way(db: Database) -> Iterator[str]:
    """By revision: tables and columns that are gone, and new columns of old tables that every row must have."""
    before: dict[str, Table] = {}
    scripts = ScriptDirectory.from_config(alembic_config(db.url)).walk_revisions()
    for revision in [script.revision for script in scripts][::-1]:
        db.migrate(revision)
        now = _tables(db)
        for name, table in before.items():
            if name not in now:
                yield f"{revision} {name}"
                continue
            columns = now[name].columns
            yield from (f"{revision} {name}.{gone}" for gone in sorted(set(table.columns.keys()) - set(columns.keys())))
            new = [column for column in columns if column.name not in table.columns]
            yield from (f"{revision} {name}.{column.name}" for column in new if _is_demanded(column))
        before = now
    db.close()


def _tables(db: Database) -> dict[str, Table]:
    metadata = MetaData()
    metadata.reflect(db.engine)
    return {table.name: table for table in metadata.sorted_tables}


def _is_demanded(column: Column[object]) -> bool:
    return not column.nullable and column.server_default is None
