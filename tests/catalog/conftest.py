"""Fixtures of the catalog tests. `db` is a freshly migrated database with a clock that tests control.

The database is SQLite, or PostgreSQL under `make test-postgres`. Tests marked `both_databases` run on both, because
they test database features such as locks, triggers and migrations.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import text

from catalog.db.database import Database
from catalog.settings import Settings
from catalog.tables.table import Table
from tests import next_migration
from tests.catalog.backup_service import Service
from tests.catalog.part_sender import Sender
from tests.catalog.world import Clock, World
from tests.services.postgres import ON_POSTGRESQL, empty_database


@pytest.fixture(scope="session")
def shared_postgres_url(postgres_url: str) -> Iterator[str]:
    """Yield the URL of a database that every test leaves empty."""
    with empty_database(postgres_url, "catalog") as url:
        database = Database(url)
        database.migrate()
        database.close()
        yield url


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize the database fixtures of a test, unless it parametrizes them itself."""
    named = {mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")}
    usual = ["postgresql" if ON_POSTGRESQL else "sqlite"]
    kinds = ["sqlite", "postgresql"] if metafunc.definition.get_closest_marker("both_databases") else usual
    for fixture in {"database_url", "empty_url"} & set(metafunc.fixturenames) - named:
        metafunc.parametrize(fixture, kinds, indirect=True)


@pytest.fixture
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        path = tmp_path / "lorry.db"
        shutil.copy(request.getfixturevalue("migrated_database"), path)
        yield f"sqlite:///{path}"
        return
    url = request.getfixturevalue("shared_postgres_url")
    yield url
    database = Database(url)
    names = ", ".join(f'"{table.name}"' for table in Table.metadata.sorted_tables)
    with database.engine.begin() as connection:
        connection.execute(text(f"truncate {names} restart identity cascade"))
    database.close()


@pytest.fixture
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of a database without tables. The file of a SQLite database does not exist yet."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'new folder' / 'lorry.db'}"
    return request.getfixturevalue("new_postgres_url")


@pytest.fixture
def older_url(empty_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of a database whose tables lack the latest migration, the one of tests/next_migration.py."""
    database = Database(empty_url)
    database.migrate()
    database.close()
    next_migration.install(tmp_path / "scripts", monkeypatch)
    return empty_url


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def db(database_url: str, clock: Clock) -> Iterator[Database]:
    database = Database(database_url, clock=clock)
    yield database
    database.close()


@pytest.fixture
def world(db: Database, clock: Clock) -> World:
    """Two projects with a key each, a base model, and a data file of the first project."""
    return World(db, clock)


@pytest.fixture
def sender(world: World, tmp_path: Path) -> Sender:
    return Sender(world, tmp_path)


@pytest.fixture
def service(world: World, tmp_path: Path) -> Service:
    return Service(world, tmp_path)


@pytest.fixture
def elsewhere(world: World, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Settings]:
    """Yield the settings of another machine, whose data folder and database are empty."""
    folder = tmp_path / "elsewhere"
    if world.db.is_sqlite:
        yield Settings(data_dir=folder, database_url=None, store_url=None)
        return
    with empty_database(request.getfixturevalue("postgres_url"), f"elsewhere_{secrets.token_hex(6)}") as url:
        yield Settings(data_dir=folder, database_url=SecretStr(url), store_url=None)
