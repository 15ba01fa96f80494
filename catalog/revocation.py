"""Revokes API keys, optionally with the keys, jobs, sweeps, batches and exports that they created.

Keys are revoked in one transaction, all or none, so that no new work appears. After that, what they created is
cancelled, a few rows in each transaction. An interrupted call can be repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session, aliased

from catalog.batches import commands as batch_commands
from catalog.caller import Caller
from catalog.db.database import Database, read_clock, serialize
from catalog.errors import Conflict, Forbidden
from catalog.exports import commands as export_commands
from catalog.jobs import commands as job_commands
from catalog.states import UNFINISHED_STATES
from catalog.sweeps import queries as sweep_commands
from catalog.tables.jobs import Job, Sweep
from catalog.tables.serving import Batch
from catalog.tables.storage import UNFINISHED_EXPORTS, AdapterExport
from catalog.tables.table import Json
from catalog.tables.tenancy import ApiKey
from catalog.tenancy import authentication
from catalog.tenancy.api_keys import check_may_change, find, last_operator
from catalog.tenancy.authentication import is_live, lasting_operators

JOBS_AT_ONCE = 50
SWEEPS_AT_ONCE = 10
BATCHES_AT_ONCE = EXPORTS_AT_ONCE = 50
"""Rows that one transaction cancels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnfinishedWork:
    """Unfinished work that keys have created, except that whose cancellation is requested."""

    num_jobs: int = 0
    num_sweeps: int = 0
    num_batches: int = 0
    num_exports: int = 0

    def counts(self) -> dict[str, int]:
        """Return the numbers as the API and the audit log name them."""
        return {
            "unfinished_jobs": self.num_jobs,
            "unfinished_sweeps": self.num_sweeps,
            "unfinished_batches": self.num_batches,
            "unfinished_exports": self.num_exports,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Revocation:
    """Result of a call: the revoked keys, and the work and keys that remain."""

    key: ApiKey
    revoked: Sequence[str]
    """Ids of the revoked keys: the key, and its descendants if they were to be revoked too."""
    num_valid_descendants: int
    """Number of valid keys that the key created, directly or through other keys."""
    left: UnfinishedWork
    """Unfinished work of all keys in `revoked`."""


def revoke(
    db: Database, *, caller: Caller, api_key_id: str, cancel: bool = False, with_descendants: bool = False
) -> Revocation:
    """Revoke a key and the browser sessions created from it. A key that is revoked already stays as it is.

    with_descendants: also revoke the keys that it created, directly or through other keys. cancel: also cancel the
    unfinished work that the revoked keys created.

    Raises NotFound; Unauthorized if the caller's key was revoked meanwhile; Forbidden if the caller may not change one
    of the keys or may not cancel jobs; Conflict for the last operator key, and if the caller's own key is among the
    descendants. Then nothing is revoked.
    """
    if cancel and "jobs:write" not in caller.scopes:
        raise Forbidden("missing_scope_to_cancel", caller=caller.name, param="cancel")
    with db.write() as session:
        serialize(session, "operators' keys")
        authentication.check_valid(session, caller.api_key_id, now=read_clock(session))
        key = find(session, caller, api_key_id)
        check_may_change(session, caller, key)
        ended = [key, *_descendants(session, key)] if with_descendants else [key]
        _end(session, caller, ended, is_canceling=cancel)
    ids, project_ids = [each.id for each in ended], {each.project_id for each in ended}
    if cancel:
        _cancel_sweeps(db, ids)
        _cancel_jobs(db, ids, project_ids)
        _cancel_batches(db, ids, project_ids)
        _cancel_exports(db, ids, project_ids)
    with db.read() as session:
        return Revocation(
            key=key,
            revoked=ids,
            num_valid_descendants=_count_valid(_descendants(session, key), now=read_clock(session)),
            left=_unfinished(session, ids, project_ids),
        )


def _end(session: Session, caller: Caller, ended: Sequence[ApiKey], *, is_canceling: bool) -> None:
    now = read_clock(session)
    to_revoke = [key for key in ended if key.revoked_at is None]
    ids = {key.id for key in to_revoke}
    if caller.api_key_id in ids - {ended[0].id}:
        raise Conflict("revokes_own_key", ended=ended[0].id, key=caller.api_key_id, param="with_descendants")
    for key in to_revoke:
        check_may_change(session, caller, key)
    lasting = [key.id for key in lasting_operators(session, now=now)]
    if lasting and ids.issuperset(lasting):
        raise last_operator(next(key for key in to_revoke if key.id == lasting[0]))
    for key in to_revoke:
        key.revoked_at = now
    for key in to_revoke:
        left = _unfinished(session, [key.id], {key.project_id})
        details: Json = left.counts()
        details |= {"valid_descendants": _count_valid(_descendants(session, key), now=now), "cancel": is_canceling}
        authentication.note(session, "api_key.revoked", key, now=now, details=details)


def _descendants(session: Session, key: ApiKey) -> list[ApiKey]:
    """Return the keys that the key created, directly or through other keys, also by rotation; the oldest first."""
    found = select(ApiKey.id).where(ApiKey.created_by == key.id).cte("descendants", recursive=True)
    child = aliased(ApiKey)
    found = found.union(select(child.id).where(child.created_by == found.c.id))
    others = select(ApiKey).join(found, found.c.id == ApiKey.id).where(ApiKey.id != key.id)
    return list(session.scalars(others.order_by(ApiKey.created_at, ApiKey.id)))


def _count_valid(found: Sequence[ApiKey], *, now: float) -> int:
    return sum(is_live(key, now) for key in found)


def _unfinished(session: Session, key_ids: Collection[str], project_ids: Collection[str]) -> UnfinishedWork:
    """Count unfinished work of these keys. A key creates work only in its own project, which the indexes find."""
    of_jobs = select(func.count()).select_from(Job).where(Job.project_id.in_(project_ids))
    of_jobs = of_jobs.where(Job.state.in_(UNFINISHED_STATES), Job.created_by.in_(key_ids))
    of_sweeps = select(func.count()).select_from(Sweep).where(Sweep.created_by.in_(key_ids))
    of_sweeps = of_sweeps.where(Sweep.finished_at.is_(None), Sweep.cancel_requested.is_(False))
    return UnfinishedWork(
        num_jobs=session.scalar(of_jobs.where(Job.cancel_requested.is_(False))) or 0,
        num_sweeps=session.scalar(of_sweeps) or 0,
        num_batches=session.scalar(_batches(key_ids, project_ids, func.count())) or 0,
        num_exports=session.scalar(_exports(key_ids, project_ids, func.count())) or 0,
    )


def _batches(key_ids: Collection[str], project_ids: Collection[str], selected: Any = Batch) -> Select[Any]:
    """Select batches that can be cancelled."""
    own = select(selected).where(Batch.project_id.in_(project_ids), Batch.created_by.in_(key_ids))
    return own.where(Batch.finished_at.is_(None), Batch.status.in_(batch_commands.CANCELLABLE))


def _exports(key_ids: Collection[str], project_ids: Collection[str], selected: Any = AdapterExport) -> Select[Any]:
    """Select unfinished exports."""
    own = select(selected).where(AdapterExport.project_id.in_(project_ids), AdapterExport.created_by.in_(key_ids))
    return own.where(AdapterExport.status.in_(UNFINISHED_EXPORTS))


def _cancel_sweeps(db: Database, key_ids: Collection[str]) -> None:
    """Request the cancellation of the keys' sweeps. Called before `_cancel_jobs`, so that no sweep creates trials."""
    own = select(Sweep).where(Sweep.created_by.in_(key_ids), Sweep.finished_at.is_(None))
    some = own.where(Sweep.cancel_requested.is_(False)).order_by(Sweep.id).limit(SWEEPS_AT_ONCE)
    _cancel_each(db, some, lambda session, sweep, _: sweep_commands.request_cancel(session, sweep))


def _cancel_jobs(db: Database, key_ids: Collection[str], project_ids: Collection[str]) -> None:
    own = select(Job).where(Job.project_id.in_(project_ids), Job.created_by.in_(key_ids))
    unfinished = own.where(Job.state.in_(UNFINISHED_STATES), Job.cancel_requested.is_(False))
    some = unfinished.order_by(Job.id).limit(JOBS_AT_ONCE)
    _cancel_each(db, some, lambda session, job, now: job_commands.stop(session, job, job_commands.CANCEL, now=now))


def _cancel_batches(db: Database, key_ids: Collection[str], project_ids: Collection[str]) -> None:
    some = _batches(key_ids, project_ids).order_by(Batch.id).limit(BATCHES_AT_ONCE)
    _cancel_each(db, some, lambda session, batch, now: batch_commands.request_cancel(session, batch, now=now))


def _cancel_exports(db: Database, key_ids: Collection[str], project_ids: Collection[str]) -> None:
    some = _exports(key_ids, project_ids).order_by(AdapterExport.id).limit(EXPORTS_AT_ONCE)
    _cancel_each(db, some, lambda session, export, now: export_commands.end_unfinished(session, export, now=now))


def _cancel_each(db: Database, some: Select[Any], cancel: Callable[[Session, Any, float], object]) -> None:
    """Cancel the rows that `some` selects, in one transaction each time, until it selects none."""
    entity = some.column_descriptions[0]["entity"]
    while True:
        with db.write() as session:
            found = list(session.scalars(some.with_for_update(of=entity)))
            now = read_clock(session)
            for row in found:
                cancel(session, row, now)
        if not found:
            return
