"""Fails where the migrations and catalog/tables/ disagree, on a fresh SQLite and a fresh PostgreSQL."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from alembic import command

sys.path.insert(0, str(Path(__file__).parents[1]))

from catalog.db.database import Database
from catalog.db.revisions import alembic_config
from tests.services.postgres import postgres_server


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(f"sqlite:///{folder}/lorry.db")
    with postgres_server() as url:
        check(url)


def check(url: str) -> None:
    """Migrate to the newest revision, where `alembic check` must find no differences."""
    database = Database(url)
    database.migrate()
    name = database.engine.dialect.name
    database.close()
    sys.stdout.write(f"{name}: ")
    sys.stdout.flush()
    command.check(alembic_config(url))


if __name__ == "__main__":
    main()
