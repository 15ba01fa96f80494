"""Checks whether this code's version is compatible with the service that owns the database.

A worker may register only if its schema revision equals the database's and its protocol number is within the window
that the service has announced. The revision is checked first: the tables match this code only if it is equal. API
servers also run on newer tables, because a migration removes nothing that the previous release uses. On older tables,
columns would be missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from sqlalchemy.orm import Session

from catalog.db import revisions
from catalog.db.database import Database
from catalog.errors import Conflict, UnfitWorker
from catalog.tables.fleet import Service

PROTOCOL = 4
"""Protocol of this code's workers. Increment it if data or files that workers read and write change their meaning."""
OLDEST_PROTOCOL = 4
"""Oldest protocol that a service of this code supports. Workers with an older one are drained.

Workers of protocol 1 reject a JobSpec with `slice_tokens`, and don't send the token of a reply address. Those of
protocol 2 reject `evaluation` and `method_options`. Those of protocol 3 look for inference requests in the database.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """The protocols that the service supports, both ends included, and the version of the service."""

    oldest: int
    newest: int
    version: str

    def has(self, protocol: int) -> bool:
        return self.oldest <= protocol <= self.newest


def announce(db: Database) -> None:
    """Store the supported protocols and this version. Call it after migrating the database."""
    with db.write() as session:
        row = session.get(Service, 1, with_for_update=True) or Service(id=1)
        row.oldest_protocol, row.newest_protocol = OLDEST_PROTOCOL, PROTOCOL
        row.version = lorry_version()
        session.add(row)


def check(db: Database) -> None:
    """Check a worker of this code before it writes anything.

    Raises UnfitWorker, and Unavailable if the database has no tables yet.
    """
    with db.read() as session:
        check_in(session, protocol=PROTOCOL)


def check_in(session: Session, *, protocol: int) -> None:
    database_revision = revisions.read(session)
    if database_revision != revisions.newest():
        raise _of_another_revision(session, database_revision)
    window = window_of(session)
    if not window.has(protocol):
        raise _of_another_protocol(protocol, window)


def check_tables(session: Session, *, if_older: str = "database_too_old") -> None:
    """Check the tables before an API server accepts requests. Newer tables are accepted.

    Raises Conflict with the text `if_older` if the tables are older than this code.
    """
    database_revision = revisions.read(session)
    if revisions.is_unreleased(database_revision):
        raise revisions.not_upgradable(database_revision)
    if revisions.is_older(database_revision):
        own, needed = lorry_version(), revisions.newest()
        raise Conflict(
            if_older,
            own=own,
            needed=needed,
            revision=database_revision or "none",
        )


def window_of(session: Session) -> Window:
    """Return the announced window, or this code's own if none was announced."""
    row = session.get(Service, 1)
    if row is None:
        return Window(oldest=OLDEST_PROTOCOL, newest=PROTOCOL, version=lorry_version())
    return Window(oldest=row.oldest_protocol, newest=row.newest_protocol, version=row.version)


@cache
def lorry_version() -> str:
    try:
        return version("lorry")
    except PackageNotFoundError:
        return "unknown"


def _of_another_revision(session: Session, database_revision: str | None) -> UnfitWorker:
    if revisions.is_unreleased(database_revision):
        return UnfitWorker(revisions.not_upgradable(database_revision).text)
    versions = {"own": lorry_version(), "needed": revisions.newest(), "revision": database_revision or "none"}
    if revisions.is_older(database_revision):
        return UnfitWorker("worker_too_new_for_database", **versions)
    announced = session.get(Service, 1)  # newer tables keep what this version reads
    if announced and announced.version != lorry_version():
        return UnfitWorker("worker_too_old_for_database", **versions, service=announced.version)
    return UnfitWorker("worker_too_old_for_unknown_service", **versions)


def _of_another_protocol(protocol: int, window: Window) -> UnfitWorker:
    return UnfitWorker(
        "worker_too_old" if protocol < window.oldest else "worker_too_new",
        own=lorry_version(),
        protocol=protocol,
        service=window.version,
        oldest=window.oldest,
        newest=window.newest,
    )
