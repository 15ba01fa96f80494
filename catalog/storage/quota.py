"""The quota of stored bytes, checked in the transactions that store them. catalog.usage.quotas has the limit."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import Select, func, select, union_all
from sqlalchemy.orm import Session

from catalog.db.database import serialize
from catalog.errors import QuotaExceeded
from catalog.storage import token_cache
from catalog.tables.jobs import Job, Plan
from catalog.tables.storage import UNFINISHED_EXPORTS, AdapterExport, File, Prepared
from catalog.tables.tenancy import Project
from catalog.usage.ledger import DAY_SECONDS
from catalog.usage.quotas import (
    NEEDING,
    QuotaStatus,
    counted,
    enough_at,
    exceeded,
    project_of,
    refusal,
    status_of,
    utc_time,
)

LEAVING_SECONDS = 2 * DAY_SECONDS
"""How long after a deletion bytes may stay in the store: garbage collection runs daily and skips younger objects."""


def check_preparation(session: Session, work: Job | Plan, *, now: float) -> None:
    """Check the quota for the token caches that a new job or plan needs, in the transaction that creates it.

    The size of the files is used as an estimate of the size of their caches. Raises QuotaExceeded.
    """
    if project_of(session, work.project_id).max_stored_bytes is None:
        return
    session.flush()
    if token_cache.is_any_missing(session, (work.train_prepared, work.valid_prepared)):
        serialize(session, f"quota {work.project_id}")
        needed = token_cache.promised_bytes(session, work.project_id)
        check_stored(session, work.project_id, needed, now=now, needing="files that have to be prepared need")


def precheck_stored(session: Session, project_id: str, num_bytes: int, *, now: float) -> None:
    """Raises QuotaExceeded if `num_bytes` more would currently exceed the quota. Only `check_stored`, which takes the
    project's quota lock, is reliable."""
    project = project_of(session, project_id)
    if project.max_stored_bytes is not None:
        expected = _expected_bytes(session, project.id)
        _num_beyond(session, project, project.max_stored_bytes, num_bytes, expected=expected, now=now)


def check_stored(
    session: Session,
    project_id: str,
    num_bytes: int,
    *,
    now: float,
    needing: str = NEEDING,
    is_finished_export: bool = False,
) -> None:
    """Check the quota for `num_bytes` more, in the transaction that stores them. Raises QuotaExceeded.

    needing: for the message, what needs them. is_finished_export: they were estimated when the export was created, so
    the estimates of unfinished exports do not count this time. Unused token caches are evicted if they are in the way.
    Deleted and evicted bytes stop counting at once, although they leave the disk later. Counted bytes and those that
    have not left the disk yet are limited to twice the quota.
    """
    project = project_of(session, project_id)
    if project.max_stored_bytes is not None:
        serialize(session, f"quota {project.id}")
        num_beyond = _num_beyond(
            session,
            project,
            project.max_stored_bytes,
            num_bytes,
            expected=0 if is_finished_export else _expected_bytes(session, project.id),
            now=now,
            needing=needing,
        )
        if num_beyond > 0:
            token_cache.evict(session, project.id, num_beyond, now=now)


def _expected_bytes(session: Session, project_id: str) -> int:
    """Return the estimated size of the project's unfinished exports."""
    unfinished = (AdapterExport.project_id == project_id, AdapterExport.status.in_(UNFINISHED_EXPORTS))
    return int(session.scalar(select(func.sum(AdapterExport.expected_bytes)).where(*unfinished)) or 0)


def _num_beyond(
    session: Session,
    project: Project,
    maximum: int,
    num_bytes: int,
    *,
    expected: int,
    now: float,
    needing: str = NEEDING,
) -> int:
    """Return how many bytes of unused token caches must be evicted to store `num_bytes` more; none if not positive.

    expected: bytes of unfinished exports, which will be stored too. Raises QuotaExceeded.
    """
    status = status_of(session, project, "stored_bytes", now=now)
    num_over = int(status.used) + expected + num_bytes - maximum
    if num_over > 0 and num_over > token_cache.evictable_bytes(session, project.id):
        if expected and num_bytes <= maximum:
            needing = f"its unfinished exports need about {expected:,}, and {needing}"
        raise exceeded(project, status, now=now, num_more=num_bytes, needing=needing)
    each = _leaving(project.id, now=now).subquery()
    num_leaving = int(session.scalar(select(func.sum(each.c.num_bytes))) or 0)
    num_beyond = int(status.used) + num_leaving + num_bytes - 2 * maximum
    if num_beyond > 0:
        leaving = [(row.num_bytes, row.at) for row in session.execute(_leaving(project.id, now=now))]
        limited = replace(status, resets_at=enough_at(leaving, num_beyond, now=now))
        raise _too_many_leaving(project, limited, now=now, num_more=num_bytes, num_leaving=num_leaving, needing=needing)
    return num_over


def _leaving(project_id: str, *, now: float) -> Select[int, float]:
    """Select the bytes of deleted files and evicted token caches that may still be on the disk, and when they have left
    it at the latest."""
    gone = (File.project_id == project_id, File.deleted_at > now - LEAVING_SECONDS)
    by_when = (func.max(File.deleted_at) + LEAVING_SECONDS).label("at")
    deleted = select(File.num_bytes, by_when).where(*gone).group_by(File.digest, File.num_bytes)
    evicted = select(Prepared.num_bytes, (Prepared.evicted_at + LEAVING_SECONDS).label("at"))
    evicted = evicted.where(Prepared.project_id == project_id, Prepared.evicted_at > now - LEAVING_SECONDS)
    each = union_all(deleted, evicted).subquery()
    return select(each.c.num_bytes, each.c.at)


def _too_many_leaving(
    project: Project, status: QuotaStatus, *, now: float, num_more: int, num_leaving: int, needing: str
) -> QuotaExceeded:
    """Return the error for deleted bytes that are still on the disk. Deleting more would not help."""
    values = {"used": counted(int(status.used), "stored byte"), "deleted": counted(num_leaving, "deleted byte")}
    if status.resets_at is None:
        name = "deleted_bytes_still_stored"
    else:
        name, values = "deleted_bytes_still_stored_until", {**values, "time": utc_time(status.resets_at)}
    return refusal(name, project=project, status=status, now=now, needing=needing, num_more=num_more, **values)
