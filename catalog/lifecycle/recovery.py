"""Ends the claims of jobs whose lease has expired. After an outage of the database, leases get one extension.

An outage shows as a gap in the heartbeat of the database (DatabaseHeartbeat). No worker could renew a lease during it,
so an expired lease does not prove that its worker is dead: the lease of every job is extended once, to a full lease
from now. A second extension needs a heartbeat in between, so a dead worker delays its jobs by at most one lease. A
clock that was set back looks like an outage and is treated as one. Leases of other work (catalog/db/lease.py) are not
extended, because that work can be repeated without loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from sqlalchemy import Select, and_, exists, or_, select
from sqlalchemy.orm import Session

from catalog.db.database import Database, clock_column, clock_given, read_clock, skip_locked, upsert
from catalog.lifecycle.outcomes import end_attempt
from catalog.states import EndReason, JobState
from catalog.tables.fleet import DatabaseHeartbeat, Worker
from catalog.tables.jobs import Job
from catalog.usage import ledger

CLAIMED = (Job.state == JobState.RUNNING, Job.claim_id.is_not(None))


def expire(db: Database, *, lease_seconds: float) -> int:
    """End every claim whose lease has expired by the database's clock. Returns their number.

    lease_seconds: the length of a lease, to which leases are extended after an outage of the database. Any process may
    call this at any time.
    """
    with db.read() as session:  # most checks find no expired lease, and a read transaction blocks no writer
        if not _is_needed(session, lease_seconds=lease_seconds):
            return 0
    with db.write() as session:
        now = read_clock(session)
        _observe(session, now=now, lease_seconds=lease_seconds)
        # A first query uses the index of leases. The second one locks in the order of ids, which that index lacks.
        is_past = (*CLAIMED, Job.lease_expires_at <= now)
        past = list(session.scalars(select(Job.id).where(*is_past)))
        locked = skip_locked(select(Job).where(Job.id.in_(past), *is_past).order_by(Job.id))
        expired = list(session.scalars(locked))
        for _ in expired:
            ledger.count(session, "leases_expired", "training")
        return _lose(session, expired, now=now)


def observe(db: Database, *, lease_seconds: float) -> None:
    """Record that the database answers. After a gap, extend the leases that no worker could renew.

    Opens its own transaction: it may wait for the row of any job, and must not hold locks that their holders wait for.
    """
    with db.read() as session:
        beat, now = session.get(DatabaseHeartbeat, 1), read_clock(session)
        if beat is not None and not _is_old(beat.seen_at, now=now, lease_seconds=lease_seconds):
            return
    with db.write() as session:
        _observe(session, now=read_clock(session), lease_seconds=lease_seconds)


def _observe(session: Session, *, now: float, lease_seconds: float) -> None:
    beat = session.get(DatabaseHeartbeat, 1)
    if beat is None:
        upsert(session, DatabaseHeartbeat, [{"id": 1, "seen_at": now}])
        return
    if not _is_old(beat.seen_at, now=now, lease_seconds=lease_seconds):
        return
    # The process that holds the row writes the same time. Wait for it only after a gap, when no lease may be missed.
    may_skip = not _is_gap(beat, now=now, lease_seconds=lease_seconds)
    beat = session.get(DatabaseHeartbeat, 1, with_for_update={"skip_locked": may_skip}, populate_existing=True)
    if beat is None:
        return
    if _is_gap(beat, now=now, lease_seconds=lease_seconds):
        _extend_leases(session, now=now, lease_seconds=lease_seconds)
    beat.seen_at = now


def lose_worker(session: Session, worker_id: str, *, detail: str, now: float) -> int:
    """End all claims of a worker whose process is known to be gone. Returns their number.

    detail: the sentence with which their attempts end.
    """
    claimed = select(Job).where(*CLAIMED, Job.worker_id == worker_id)
    return _lose(session, session.scalars(claimed.order_by(Job.id).with_for_update()), detail=detail, now=now)


def _is_needed(session: Session, *, lease_seconds: float) -> bool:
    given = clock_given(session)
    now, seen_at, is_past = session.execute(_leases(is_clock_given=bool(given)), given).one()
    return is_past or _is_old(seen_at, now=now, lease_seconds=lease_seconds)


@cache
def _leases(*, is_clock_given: bool) -> Select[float, float, bool]:
    """The current time, the time of the last database heartbeat, and whether a lease has expired."""
    moment = select(clock_column(is_given=is_clock_given).label("now")).cte("moment")
    seen_at = select(DatabaseHeartbeat.seen_at).where(DatabaseHeartbeat.id == 1).scalar_subquery()
    past = exists().where(*CLAIMED, Job.lease_expires_at <= select(moment.c.now).scalar_subquery())
    return select(moment.c.now, seen_at, past)


def _is_old(seen_at: float | None, *, now: float, lease_seconds: float) -> bool:
    """Whether the database heartbeat must be written again. It is written a few times per lease."""
    return seen_at is None or abs(now - seen_at) > min(5.0, lease_seconds / 20)


def _is_gap(beat: DatabaseHeartbeat, *, now: float, lease_seconds: float) -> bool:
    return now - beat.seen_at > lease_seconds / 2 or beat.seen_at - now > lease_seconds / 10


def _extend_leases(session: Session, *, now: float, lease_seconds: float) -> None:
    gone = select(Worker.id).where(Worker.ended_at.is_not(None))
    lease_is_off = or_(
        and_(Job.lease_expires_at < now + lease_seconds, Job.lease_extended.is_(False)),
        Job.lease_expires_at > now + 2 * lease_seconds,
    )
    claimed = (*CLAIMED, Job.worker_id.not_in(gone), lease_is_off)
    for job in session.scalars(select(Job).where(*claimed).order_by(Job.id).with_for_update()):
        job.lease_expires_at, job.lease_extended = now + lease_seconds, True


def in_lock_order(claimed: Iterable[Job]) -> list[Job]:
    """Sort jobs that end in one transaction. Each end of a trial locks its sweep: a fixed order prevents deadlocks."""
    return sorted(claimed, key=lambda job: (job.sweep_id or "", job.id))


def _lose(session: Session, claimed: Iterable[Job], *, detail: str | None = None, now: float) -> int:
    jobs = in_lock_order(claimed)
    for job in jobs:
        cause = detail or f"Worker {job.worker_id} stopped sending heartbeats."
        end_attempt(session, job, reason=EndReason.INFRA_LOST, detail=cause, now=now)
    return len(jobs)
