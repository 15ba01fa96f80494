"""A fault and what it needs, and the resources that all faults of a run share: servers, and an imported base model."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import psycopg

from qa.chaos.service import FaultSite, Under
from tests import tiny_base
from tests.services.fault_proxy import FaultProxy, fault_proxy
from tests.services.postgres import KILLABLE, empty_database, restartable_postgres
from tests.services.redis import restartable_redis
from tests.services.running import Restartable
from tests.services.s3 import new_bucket, s3_server
from tests.services.small_disk import mounted
from tests.worker_site import WorkerSite

DatabaseKind = Literal["sqlite", "postgresql"]
DATABASES: tuple[DatabaseKind, ...] = get_args(DatabaseKind)
SQLITE: tuple[DatabaseKind, ...] = ("sqlite",)
POSTGRESQL: tuple[DatabaseKind, ...] = ("postgresql",)
IMPORTED = "imported"
"""Name of the PostgreSQL database that is the template of each fault's database."""
DISK_BYTES = 64 * 2**20
"""Size of a small disk, which is enough for a trainer's directory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A fault that is injected. `act` returns what it observed, and raises AssertionError if the promise is broken.
    When it returns, every job has finished or is about to finish."""

    name: str
    what: str
    promise: str
    act: Callable[[FaultSite], str]
    databases: tuple[DatabaseKind, ...] = SQLITE
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """Variables for the site's processes, in addition to those that shorten the waiting times."""
    has_redis: bool = False
    has_s3: bool = False
    """The store is a bucket, which workers reach through a proxy that can fail."""
    small_disk: str | None = None
    """A folder of the site that is a separate file system, so that it can be filled. `database` contains SQLite's
    file."""


Act = Callable[..., str]
FAULTS: list[Fault] = []
"""The faults of all modules that have been imported. `qa.chaos.faults` imports all of them."""


def fault(
    name: str, what: str, *, promise: str, given: Mapping[str, object] | None = None, **needs: Any
) -> Callable[[Act], Act]:
    """Return a decorator that adds a function to the faults. given: its arguments after the site. needs: the other
    fields of `Fault`."""

    def add(act: Act) -> Act:
        FAULTS.append(Fault(name=name, what=what, promise=promise, act=partial(act, **(given or {})), **needs))
        return act

    return add


class Ground:
    """Provides the sites of a run. Servers start on first use, and stop at the end of the block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open = ExitStack()
        self._imported: dict[DatabaseKind, Path] = {}

    def __enter__(self) -> Ground:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @contextmanager
    def site(self, fault: Fault, kind: DatabaseKind, *, has_weights: bool = True) -> Generator[FaultSite]:
        """Yield a new site. Its remaining processes are killed after the block."""
        imported, weights = self._import(kind), self.weights if has_weights else None
        folder = Path(tempfile.mkdtemp(prefix=f"{fault.name}-{kind}-", dir=self._folder))
        (folder / "data").mkdir()
        with ExitStack() as stack:
            if fault.small_disk is not None:
                stack.enter_context(mounted(folder / fault.small_disk, DISK_BYTES))
            shutil.copytree(imported, folder / "data", dirs_exist_ok=True)
            environment = {**fault.environment, **self._database(stack, fault, kind, folder)}
            under = Under(postgres=self._postgres[1] if kind == "postgresql" else None)
            if fault.has_redis:
                url, redis = stack.enter_context(restartable_redis())
                under, environment["LORRY_REDIS_URL"] = replace(under, redis=redis, redis_url=url), url
            if fault.has_s3:
                proxy, of_store = self._bucket(stack)
                under, environment = replace(under, store=proxy), {**environment, **of_store}
            site = FaultSite(folder, under=under, weights=weights, **environment)
            stack.callback(site.close)
            yield site
        shutil.rmtree(folder, ignore_errors=True)

    def _database(self, stack: ExitStack, fault: Fault, kind: DatabaseKind, folder: Path) -> dict[str, str]:
        """Create a copy of the database with the imported base model. Returns the variables for it."""
        if kind == "postgresql":
            address, server = self._postgres
            server.start()
            name = f"fault_{os.urandom(4).hex()}"
            url = stack.enter_context(empty_database(address, name, template=IMPORTED))
            with psycopg.connect(address.replace("+psycopg", ""), autocommit=True) as admin:
                admin.execute("checkpoint")  # else a kill resets the copy's sequences to those of its template
            stack.callback(server.start)  # a fault may have stopped the server, but the database must be dropped
            return {"LORRY_DATABASE_URL": url}
        if fault.small_disk == "database":
            moved = shutil.move(folder / "data" / "lorry.db", folder / "database" / "lorry.db")
            return {"LORRY_DATABASE_URL": f"sqlite:///{moved}"}
        return {}

    def _bucket(self, stack: ExitStack) -> tuple[FaultProxy, dict[str, str]]:
        """Create a bucket. Returns a proxy in front of its server, and the variables for processes. This process
        accesses the server directly."""
        bucket = new_bucket(self._s3)
        address = urlsplit(self._s3)
        proxy = stack.enter_context(fault_proxy(str(address.hostname), address.port or 0))
        direct = bucket.environment()
        kept = {name: os.environ.get(name) for name in direct}
        os.environ.update(direct)
        stack.callback(_restore, kept)
        told = {**direct, "AWS_ENDPOINT": f"http://127.0.0.1:{proxy.port}"}
        return proxy, {**told, "LORRY_STORE_URL": f"s3://{bucket.name}/store"}

    @cached_property
    def weights(self) -> str:
        """The digest of the small job's adapter without any fault."""
        nothing = Fault(name="undisturbed", what="none", promise="", act=lambda _: "")
        with self.site(nothing, "sqlite", has_weights=False) as site:
            job_id = site.submit_small()
            site.work_until_done()
            return site.weights_digest(job_id)

    @cached_property
    def _postgres(self) -> tuple[str, Restartable]:
        return self._open.enter_context(restartable_postgres(settings=KILLABLE))

    @cached_property
    def _s3(self) -> str:
        return self._open.enter_context(s3_server())

    def _import(self, kind: DatabaseKind) -> Path:
        """Return the data folder after the import by a real worker, which happens once per run."""
        if kind not in self._imported:
            folder = Path(tempfile.mkdtemp(prefix=f"imported-{kind}-", dir=self._folder))
            database: dict[str, str] = {}
            if kind == "postgresql":
                url = self._open.enter_context(empty_database(self._postgres[0], IMPORTED))
                database["LORRY_DATABASE_URL"] = url
            site = WorkerSite(folder, **database)
            site.patience_seconds = FaultSite.patience_seconds
            try:
                site.import_base(tiny_base.make(self._folder / "base"))
            finally:
                site.close()
            self._imported[kind] = folder / "data"
        return self._imported[kind]


def _restore(kept: dict[str, str | None]) -> None:
    for name, value in kept.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
