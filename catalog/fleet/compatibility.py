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

from alembic.script import ScriptDirectory
from sqlalchemy import column, select, table
from sqlalchemy.orm import Session

from catalog.db.database import Database, alembic_config, read_clock
from catalog.errors import Conflict, UnfitWorker
from catalog.tables.fleet import Service

PROTOCOL = 1
"""Of this code's workers. One more where the record or the files that workers read and write change their meaning."""
OLDEST_PROTOCOL = 1
"""Workers below this can't go on beside a service of this code: they are drained."""
REVISIONS = table("alembic_version", column("version_num"))
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
    theirs = revision_of(session)
    if theirs != code_revision():
        raise _of_another_revision(theirs)
    window = window_of(session)
    if not window.has(protocol):
        raise _of_another_protocol(protocol, window)


def check_tables(session: Session, *, remedy: str = MIGRATE) -> None:
    """Before an api answers anybody. Raises Conflict where the tables are older than this code; newer ones it takes."""
    theirs = revision_of(session)
    if is_older(theirs):
        raise Conflict(f"{_needs('This program', theirs)}, an older one.", code="database_too_old", remedy=remedy)


def revision_of(session: Session) -> str | None:
    """The database's."""
    return session.scalar(select(REVISIONS.c.version_num))


def is_older(revision: str | None) -> bool:
    """Whether it comes before this code's own. One that this code doesn't know is a later version's."""
    return revision is None or revision in _earlier_revisions()


def window_of(session: Session) -> Window:
    """This code's own where nothing was announced."""
    row = session.get(Service, 1)
    if row is None:
        return Window(oldest=OLDEST_PROTOCOL, newest=PROTOCOL, version=lorry_version())
    return Window(oldest=row.oldest_protocol, newest=row.newest_protocol, version=row.version)


@cache
def code_revision() -> str:
    """The newest that this code knows."""
    return str(_scripts().get_current_head())


@cache
def lorry_version() -> str:
    try:
        return version("lorry")
    except PackageNotFoundError:
        return "unknown"


@cache
def _earlier_revisions() -> frozenset[str]:
    return frozenset(script.revision for script in _scripts().walk_revisions()) - {code_revision()}


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(alembic_config("sqlite://"))


def _of_another_revision(theirs: str | None) -> UnfitWorker:
    who = _needs("This worker", theirs)
    if is_older(theirs):
        return UnfitWorker(f"{who}, an older one.", code="database_too_old", remedy=MIGRATE)
    remedy = "Install the service's version of Lorry on this node, then start the worker again."
    return UnfitWorker(f"{who}, a newer one.", code="worker_too_old", remedy=remedy)


def _needs(who: str, theirs: str | None) -> str:
    return f"{who} (Lorry {lorry_version()}) needs the database at revision {code_revision()}, and it is at {theirs}"


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
