"""Whether this code and the service of its database are of versions that can work together.

A worker registers with the database's own revision and with a protocol number in the window that the service has
announced. The revision is looked at first: only where it is the same are the tables those that this code knows. The
api goes on with newer tables, for a migration takes nothing away that the release before it uses; with older ones it
would look for columns that are not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from sqlalchemy.orm import Session

from catalog.db import revisions
from catalog.db.database import Database, read_clock
from catalog.errors import Conflict, UnfitWorker
from catalog.tables.fleet import Service

PROTOCOL = 1
"""Of this code's workers. One more where the record or the files that workers read and write change their meaning."""
OLDEST_PROTOCOL = 1
"""Workers below this can't go on beside a service of this code: they are drained."""
MIGRATE = "Migrate it with this version, which what runs now goes on beside: python -m api bootstrap."


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """The protocols that the service takes, both ends included, and its own version."""

    oldest: int
    newest: int
    version: str

    def has(self, protocol: int) -> bool:
        return self.oldest <= protocol <= self.newest


def announce(db: Database) -> None:
    """By whoever has migrated the database: what its service takes of workers from now on."""
    with db.write() as session:
        row = session.get(Service, 1, with_for_update=True) or Service(id=1)
        row.oldest_protocol, row.newest_protocol = OLDEST_PROTOCOL, PROTOCOL
        row.version, row.announced_at = lorry_version(), read_clock(session)
        session.add(row)


def check(db: Database, *, protocol: int | None = None) -> None:
    """Before a worker writes anything. protocol: this code's own where None. Raises UnfitWorker, or Unavailable where
    the database has no tables yet."""
    with db.read() as session:
        check_in(session, protocol=PROTOCOL if protocol is None else protocol)


def check_in(session: Session, *, protocol: int) -> None:
    theirs = revisions.read(session)
    if theirs != revisions.newest():
        raise _of_another_revision(theirs)
    window = window_of(session)
    if not window.has(protocol):
        raise _of_another_protocol(protocol, window)


def check_tables(session: Session, *, remedy: str = MIGRATE) -> None:
    """Before an api answers anybody. Raises Conflict where the tables are older than this code; newer ones it takes."""
    theirs = revisions.read(session)
    if revisions.is_unreleased(theirs):
        raise revisions.not_upgradable(theirs)
    if revisions.is_older(theirs):
        raise Conflict(f"{_needs('This program', theirs)}, an older one.", code="database_too_old", remedy=remedy)


def window_of(session: Session) -> Window:
    """This code's own where nothing was announced."""
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


def _of_another_revision(theirs: str | None) -> UnfitWorker:
    if revisions.is_unreleased(theirs):
        refusal = revisions.not_upgradable(theirs)
        return UnfitWorker(refusal.message, code=refusal.code, remedy=refusal.remedy)
    who = _needs("This worker", theirs)
    if revisions.is_older(theirs):
        return UnfitWorker(f"{who}, an older one.", code="database_too_old", remedy=MIGRATE)
    remedy = "Install the service's version of Lorry on this node, then start the worker again."
    return UnfitWorker(f"{who}, a newer one.", code="worker_too_old", remedy=remedy)


def _needs(who: str, theirs: str | None) -> str:
    return f"{who} (Lorry {lorry_version()}) needs the database at revision {revisions.newest()}, and it is at {theirs}"


def _of_another_protocol(protocol: int, window: Window) -> UnfitWorker:
    taken = f"{window.oldest}" if window.oldest == window.newest else f"{window.oldest} to {window.newest}"
    message = (
        f"This worker (Lorry {lorry_version()}) speaks protocol {protocol}, and the service (Lorry {window.version}) "
        f"takes workers of protocol {taken}."
    )
    if protocol < window.oldest:
        remedy = "Install the service's version of Lorry on this node, then start the worker again."
        return UnfitWorker(message, code="worker_too_old", remedy=remedy)
    remedy = "Upgrade the service first: python -m api bootstrap of this version, then its api."
    return UnfitWorker(message, code="worker_too_new", remedy=remedy)
