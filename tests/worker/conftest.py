"""A worker on a freshly migrated database."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from catalog.db import Database
from tests.worker.pack_site import PackSite


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to copy."""
    path = tmp_path_factory.mktemp("migrated") / "lorry.db"
    database = Database(f"sqlite:///{path}")
    database.migrate()
    with database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    return path


@pytest.fixture
def site(tmp_path: Path, migrated_database: Path) -> Iterator[PackSite]:
    path = tmp_path / "lorry.db"
    shutil.copy(migrated_database, path)
    site = PackSite(tmp_path / "data", path)
    yield site
    site.db.close()
