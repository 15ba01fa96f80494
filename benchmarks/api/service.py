"""A database with content, and an API server on it that only listens on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.workload import ROOT
from catalog.db.database import Database
from catalog.tenancy import authentication
from tests.catalog.world import PEPPER, Clock, World
from tests.services.postgres import empty_database, postgres_server

DATABASES = ("postgresql", "sqlite")
DURABLE = ("fsync=on", "synchronous_commit=on", "full_page_writes=on", "shared_buffers=512MB", "max_wal_size=4GB")
"""PostgreSQL's defaults for durability, with a server's memory settings: committed data survive a power failure."""
STOP_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A migrated database, and the data folder of the service on it."""

    kind: str
    url: str
    folder: Path

    @contextmanager
    def world(self) -> Generator[World]:
        """Create two projects, a base model and a file with the catalog's own functions, in real time."""
        with closing(Database(self.url)) as db:
            yield World(db, Clock())


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    url: str
    key: str
    pid: int

    def cpu_seconds(self) -> float:
        times = psutil.Process(self.pid).cpu_times()
        return times.user + times.system


@contextmanager
def servers(kinds: Sequence[str]) -> Generator[str | None]:
    """Start a temporary PostgreSQL server if one is needed, and yield its URL."""
    if "postgresql" not in kinds:
        yield None
        return
    with postgres_server(settings=DURABLE) as url:
        yield url


@contextmanager
def place(kind: str, server: str | None, folder: Path, name: str) -> Generator[Place]:
    """Create an empty database and remove it afterwards."""
    own = folder / f"{name}-{kind}"
    own.mkdir(parents=True)
    if kind == "sqlite":
        made = Place(kind=kind, url=f"sqlite:///{own}/lorry.db", folder=own)
        _migrate(made.url)
        yield made
        return
    assert server is not None
    with empty_database(server, name) as url:
        _migrate(url)
        yield Place(kind=kind, url=url, folder=own)


def _migrate(url: str) -> None:
    with closing(Database(url)) as db:
        db.migrate()


@contextmanager
def api(place: Place, world: World, *, core: int | None = None) -> Generator[Served]:
    """Run `python -m api serve` on the database with a key of the world's project. It may use `core` only."""
    _, key = authentication.create(world.db, project_id=world.caller.project_id, name="bench", pepper=PEPPER)
    environment = {
        **os.environ,
        "LORRY_DATABASE_URL": place.url,
        "LORRY_DATA_DIR": str(place.folder),
        "LORRY_PEPPER": PEPPER.current.decode(),
        "LORRY_REQUESTS_PER_MINUTE": "0",
    }
    argv = ["-m", "api", "--log-level", "warning", "serve", "--port", "0"]
    with _serving(argv, place.folder / "api.log", environment=environment, core=core) as (url, pid):
        yield Served(url=url, key=key, pid=pid)


@contextmanager
def peer(place: Place, *, core: int | None = None) -> Generator[Served]:
    """Run `benchmarks.api.bare` on the same database. It needs no key."""
    argv = ["-m", "benchmarks.api.bare", place.url]
    with _serving(argv, place.folder / "bare.log", environment=dict(os.environ), core=core) as (url, pid):
        yield Served(url=url, key="none", pid=pid)


@contextmanager
def _serving(
    argv: Sequence[str], log_file: Path, *, environment: dict[str, str], core: int | None
) -> Generator[tuple[str, int]]:
    """Run a service that prints its address when it is ready. Yields (address, process id)."""
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *argv], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the service did not start:\n{log_file.read_text('utf-8', 'replace')}")
        if core is not None:
            psutil.Process(process.pid).cpu_affinity([core])
        yield json.loads(line)["url"], process.pid
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
