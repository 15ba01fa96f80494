"""Reads a job's events, checkpoints, curves and attempts for users. Jobs of other projects raise NotFound."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from catalog.db.database import Database, clock_of
from catalog.db.pagination import Page, paginate, unknown_cursor
from catalog.errors import NotFound
from catalog.history import metric_store
from catalog.history.events import ShownType
from catalog.history.metric_points import Point
from catalog.tables.history import NOT_METRICS, Attempt, Checkpoint, JobEvent
from catalog.tables.jobs import Job


def find(session: Session, project_id: str, job_id: str, *, locked: bool = False) -> Job:
    """Return the project's job, within a transaction. Raises NotFound."""
    owned = select(Job).where(Job.id == job_id, Job.project_id == project_id)
    job = session.scalar(owned.with_for_update(of=Job) if locked else owned)
    if job is None:
        raise NotFound("job_not_found", job_id=job_id)
    return job


def events_page(
    db: Database,
    *,
    project_id: str,
    job_id: str,
    after: int | None = None,
    limit: int = 20,
    type: ShownType | None = None,  # noqa: A002  (the API's field name)
) -> Page[JobEvent]:
    """Return a page of events, newest first. after: `seq` of the previous page's last event. type: only this type."""
    with db.read() as session:
        find(session, project_id, job_id)
        events = select(JobEvent).where(JobEvent.job_id == job_id)
        if after is not None:
            is_known = 0 <= after < 2**63 and session.scalar(events.where(JobEvent.seq == after)) is not None
            if not is_known:
                raise unknown_cursor(f"ftevent-{after}")
            events = events.where(JobEvent.seq < after)
        if type is not None:
            events = events.where(JobEvent.type == "metrics" if type == "metrics" else NOT_METRICS)
        rows = list(session.scalars(events.order_by(JobEvent.seq.desc()).limit(limit + 1)))
        return Page(items=rows[:limit], has_more=len(rows) > limit)


def checkpoints_page(
    db: Database, *, project_id: str, job_id: str, after: str | None = None, limit: int = 10
) -> Page[Checkpoint]:
    """Return a page of checkpoints, newest first. Checkpoints whose files were deleted are included."""
    with db.read() as session:
        find(session, project_id, job_id)
        scope = select(Checkpoint).where(Checkpoint.job_id == job_id)
        return paginate(session, scope, created=Checkpoint.created_at, ident=Checkpoint.id, after=after, limit=limit)


def points_at(db: Database, *, project_id: str, job_id: str, steps: Collection[int]) -> dict[tuple[str, int], Point]:
    """Return the points at these steps, by kind (`train` or `valid`) and step."""
    with db.read() as session:
        find(session, project_id, job_id)
        return {
            (kind, step): point
            for kind in ("train", "valid")
            for step, point in metric_store.at(session, job_id, kind, steps).items()
        }


def metrics(db: Database, *, project_id: str, job_id: str, kind: str, max_points: int | None = None) -> list[Point]:
    """Return a curve (`train` or `valid`), ordered by step and thinned to `max_points`. Thinning keeps the peaks."""
    with db.read() as session:
        find(session, project_id, job_id)
        if max_points is None:
            return list(metric_store.walk(session, job_id, kind))
        return metric_store.thinned(session, job_id, kind, max_points)


def first_step(db: Database, *, project_id: str, job_id: str) -> tuple[int, float] | None:
    """Return (step, loss) of the first recorded training step of any attempt."""
    with db.read() as session:
        find(session, project_id, job_id)
        found = metric_store.first(session, job_id, "train")
        return None if found is None else (found.step, found.loss)


def attempts(db: Database, *, project_id: str, job_id: str) -> list[Attempt]:
    """Return all attempts, oldest first."""
    with db.read() as session:
        find(session, project_id, job_id)
        return list(session.scalars(select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.number)))


def seconds_running(db: Database, job_ids: Collection[str]) -> dict[str, float]:
    """Return the seconds under a worker's claim of each job, over all attempts. A running attempt counts until now."""
    if not job_ids:
        return {}
    with db.read() as session:
        until = func.coalesce(Attempt.ended_at, clock_of(session))
        total = select(Attempt.job_id, func.sum(until - Attempt.started_at)).where(Attempt.job_id.in_(job_ids))
        return {row[0]: max(0.0, row[1]) for row in session.execute(total.group_by(Attempt.job_id))}


def packmates(db: Database, *, project_id: str, job_id: str) -> dict[str, list[str]]:
    """Return packmates of each attempt, by its claim id: only jobs of the same project."""
    with db.read() as session:
        find(session, project_id, job_id)
        own = list(session.scalars(select(Attempt).where(Attempt.job_id == job_id)))
        return {attempt.claim_id: _packmates(session, project_id, attempt) for attempt in own}


def _packmates(session: Session, project_id: str, attempt: Attempt) -> list[str]:
    same_trainer = (Attempt.trainer_id == attempt.trainer_id, Attempt.job_id != attempt.job_id)
    overlap = [or_(Attempt.ended_at.is_(None), Attempt.ended_at > attempt.started_at)]
    if attempt.ended_at is not None:
        overlap.append(Attempt.started_at < attempt.ended_at)
    others = select(Attempt.job_id).join(Job, Job.id == Attempt.job_id).where(*same_trainer, *overlap)
    return list(session.scalars(others.where(Job.project_id == project_id).distinct().order_by(Attempt.job_id)))
