"""How many bytes a project stores: checked in the transactions that store them. The limit itself is one of quotas."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import Select, func, select, union_all
from sqlalchemy.orm import Session

from catalog.db.database import serialize
from catalog.errors import QuotaExceeded
from catalog.storage import token_cache
from catalog.tables.jobs import Job
from catalog.tables.plans import Plan
from catalog.tables.storage import File, Prepared
from catalog.tables.tenancy import Project
from catalog.usage.ledger import DAY_SECONDS
from catalog.usage.quotas import QuotaStatus, enough_at, exceeded, project_of, refusal, standing_of, utc_time

LEAVING_SECONDS = 2 * DAY_SECONDS
"""So long after a deletion bytes may lie in the store: cleanings are a day apart, and spare what is younger."""


def check_preparation(session: Session, work: Job | Plan, *, now: float) -> None:
    """The token caches that a new job or plan waits for, in the transaction that creates it: their size is taken to be
    that of the files. Raises QuotaExceeded."""
    if project_of(session, work.project_id).max_stored_bytes is None:
        return
    session.flush()
    if token_cache.is_any_missing(session, (work.train_prepared, work.valid_prepared)):
        serialize(session, f"quota {work.project_id}")
        check_stored(session, work.project_id, token_cache.promised_bytes(session, work.project_id), now=now)


def look_stored(session: Session, project_id: str, num_bytes: int, *, now: float) -> None:
    """Whether so many bytes more would be refused as things are. `check_stored` alone makes sure of it."""
    project = project_of(session, project_id)
    if project.max_stored_bytes is not None:
        _num_beyond(session, project, project.max_stored_bytes, num_bytes, now=now)


def check_stored(session: Session, project_id: str, num_bytes: int, *, now: float) -> None:
    """So many bytes more, in the transaction that stores them. Unused token caches are evicted where they are in the
    way. Deleting and evicting make room at once, though bytes leave the disk later: what is there and what is leaving
    come to twice the limit at most. Raises QuotaExceeded."""
    project = project_of(session, project_id)
    if project.max_stored_bytes is not None:
        serialize(session, f"quota {project.id}")
        num_beyond = _num_beyond(session, project, project.max_stored_bytes, num_bytes, now=now)
        if num_beyond > 0:
            token_cache.evict(session, project.id, num_beyond, now=now)


def _num_beyond(session: Session, project: Project, most: int, num_bytes: int, *, now: float) -> int:
    """How many bytes of unused token caches have to go for so many bytes more; not positive: none."""
    standing = standing_of(session, project, "stored_bytes", now=now)
    num_over = int(standing.used) + num_bytes - most
    if num_over > 0 and num_over > token_cache.evictable_bytes(session, project.id):
        raise exceeded(project, standing, now=now, num_more=num_bytes)
    each = _leaving(project.id, now=now).subquery()
    num_leaving = int(session.scalar(select(func.sum(each.c.num_bytes))) or 0)
    num_beyond = int(standing.used) + num_leaving + num_bytes - 2 * most
    if num_beyond > 0:
        leaving = [(row.num_bytes, row.at) for row in session.execute(_leaving(project.id, now=now))]
        told = replace(standing, resets_at=enough_at(leaving, num_beyond, now=now))
        raise _too_many_leaving(project, told, now=now, num_more=num_bytes, num_leaving=num_leaving)
    return num_over


def _leaving(project_id: str, *, now: float) -> Select[int, float]:
    """Bytes of deleted files and evicted token caches that may be on the disk still, and by when they are not."""
    gone = (File.project_id == project_id, File.deleted_at > now - LEAVING_SECONDS)
    by_when = (func.max(File.deleted_at) + LEAVING_SECONDS).label("at")
    deleted = select(File.num_bytes, by_when).where(*gone).group_by(File.digest, File.num_bytes)
    evicted = select(Prepared.num_bytes, (Prepared.evicted_at + LEAVING_SECONDS).label("at"))
    evicted = evicted.where(Prepared.project_id == project_id, Prepared.evicted_at > now - LEAVING_SECONDS)
    each = union_all(deleted, evicted).subquery()
    return select(each.c.num_bytes, each.c.at)


def _too_many_leaving(
    project: Project, standing: QuotaStatus, *, now: float, num_more: int, num_leaving: int
) -> QuotaExceeded:
    """Bytes that were deleted stand in the way: deleting more would not help."""
    message = (
        f"The project {project.name!r} may have {standing.said()}, and twice as many with those that were deleted and "
        f"are on the disk still; it has {standing.used:,.0f} and {num_leaving:,} of deleted files and evicted tokens, "
        f"and this would be {num_more:,} more."
    )
    by_when = "" if standing.resets_at is None else f": by {utc_time(standing.resets_at)} enough of them have left"
    return refusal(project, standing, message, f"Wait for the daily cleaning{by_when}.", now=now)
