"""Finds the jobs that have changed since the last poll, for streams.

Writers of events and points hold the lock of the job's row. Events of one job are therefore committed in the order of
their numbers, and a query for "after this number" misses nothing. Between jobs there is no such order, and this module
does not rely on one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session

from catalog.db.database import Database, clock_of
from catalog.history import metric_store
from catalog.history.metric_points import Point
from catalog.history.queries import find
from catalog.states import FINAL_STATES
from catalog.tables.history import JobEvent
from catalog.tables.jobs import Job

RECENT_SECONDS = 10.0
"""A new watcher receives the metrics of this many past seconds."""
MAX_ROWS = 1000
"""Maximum number of events per poll; the next poll continues after them."""
JOBS_A_QUESTION, JOBS_OF_EVENTS = 500, 20
"""Maximum numbers of jobs in one query: for their rows, and for their events."""
UNSEEN = frozenset({"requested", "spec", "body_digest", "labels", "lease_expires_at", "charged_at", "device_seconds"})
"""Columns of a job that never change, or whose changes are not shown to watchers."""


@dataclass(kw_only=True, slots=True)
class Cursor:
    """Position of one watcher."""

    project_id: str
    job_id: str
    seq: int
    """Number of the last event that was sent or skipped."""
    quiet_until: int = 0
    """Metrics (events and points) up to this number are skipped: they are older than the watcher."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobChanges:
    job: Job
    items: list[JobEvent | Point]
    """In the order in which they were written. The points of a write precede its events."""
    has_more: bool
    """The limit of one poll was reached, so there may be more."""

    @property
    def events(self) -> list[JobEvent]:
        return [item for item in self.items if isinstance(item, JobEvent)]

    @property
    def points(self) -> list[Point]:
        return [item for item in self.items if isinstance(item, Point)]


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchedJob:
    """State of a watched job at the last poll: the number of its last event, and its row."""

    seq: int
    row: tuple[Any, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Changes of one of many watched jobs."""

    seen: WatchedJob
    job: Job
    items: list[JobEvent | Point]
    has_more: bool


def start(db: Database, *, project_id: str, job_id: str, last_seen: int | None) -> Cursor:
    """Start to watch a job after the event `last_seen`, or at its first event.

    A returning watcher receives what was committed after that event, without repetitions. A new watcher receives all
    messages, but only the metrics (events and points) of the last few seconds: it reads the complete curve once
    separately. Raises NotFound.
    """
    with db.read() as session:
        find(session, project_id, job_id)
        cursor = Cursor(project_id=project_id, job_id=job_id, seq=last_seen or 0)
        seen = session.get(JobEvent, last_seen) if last_seen else None
        if seen is None or seen.job_id != job_id:
            old = (JobEvent.job_id == job_id, JobEvent.created_at < clock_of(session) - RECENT_SECONDS)
            cursor.quiet_until = session.scalar(select(func.max(JobEvent.seq)).where(*old)) or 0
        return cursor


def poll(db: Database, cursor: Cursor) -> JobChanges:
    """Return the changes since `cursor`, and advance it."""
    with db.read() as session:
        job = find(
            session, cursor.project_id, cursor.job_id
        )  # before the events: a final job then has all of its events
        is_shown = or_(JobEvent.type != "metrics", JobEvent.seq > cursor.quiet_until)
        newer = select(JobEvent).where(JobEvent.job_id == cursor.job_id, JobEvent.seq > cursor.seq, is_shown)
        events = list(session.scalars(newer.order_by(JobEvent.seq).limit(MAX_ROWS)))
        has_more = len(events) == MAX_ROWS
        sent, known = max(cursor.seq, cursor.quiet_until), _last_of(events, cursor.seq)
        points: list[Point] = []
        if known > sent:
            found = metric_store.written(session, {cursor.job_id: sent})
            points = [point for _, point in found if point.seq <= known]
        cursor.seq = known if has_more else max(known, cursor.quiet_until)
        return JobChanges(job=job, items=_in_order(events, points), has_more=has_more)


def poll_many(db: Database, seen: Mapping[tuple[str, str], WatchedJob]) -> dict[tuple[str, str], Change | None]:
    """Return the changed jobs by (project, job). The value is None if the job does not exist.

    The number of queries does not depend on the number of watchers, and unchanged jobs need no query of their own.
    """
    changes: dict[tuple[str, str], Change | None] = {}
    keys = list(seen)
    for i in range(0, len(keys), JOBS_A_QUESTION):
        with db.read() as session:
            changes |= _changes(session, {key: seen[key] for key in keys[i : i + JOBS_A_QUESTION]})
    return changes


def newest_event(db: Database) -> int:
    """Return the number of the newest event of any job. A different number means that something has changed.

    Transactions commit in any order, so an event with a lower number may become visible later. Watchers must also poll
    from time to time for this reason.
    """
    with db.read() as session:
        return session.scalar(select(func.max(JobEvent.seq))) or 0


def _changes(session: Session, seen: Mapping[tuple[str, str], WatchedJob]) -> dict[tuple[str, str], Change | None]:
    rows = _rows(session, [job_id for _, job_id in seen])
    found = {key: row if (row := rows.get(key[1])) is not None and row[0] == key[0] else None for key in seen}
    moved = {key: row for key, row in found.items() if row is not None and row != seen[key].row}
    jobs = _jobs(session, [job_id for _, job_id in moved])
    since = {job_id: seen[project_id, job_id].seq for project_id, job_id in moved}
    # A job may have finished after the first query. Its last events must be read now: there is no later poll.
    asked = {id_: seq for id_, seq in since.items() if rows[id_][1] > seq or jobs[id_].state in FINAL_STATES}
    events, cut = _events(session, asked)
    known = {job_id: _last_of(events.get(job_id, []), seq) for job_id, seq in since.items()}
    points: dict[str, list[Point]] = {}
    for job_id, point in metric_store.written(session, {job_id: since[job_id] for job_id in events}):
        if point.seq <= known[job_id]:
            points.setdefault(job_id, []).append(point)
    changes: dict[tuple[str, str], Change | None] = {key: None for key, row in found.items() if row is None}
    for key, row in moved.items():
        job_id = key[1]
        changes[key] = Change(
            # row=None makes the next poll see the job as changed, and read the remaining events.
            seen=WatchedJob(seq=known[job_id], row=None if job_id in cut else row),
            job=jobs[job_id],
            items=_in_order(events.get(job_id, []), points.get(job_id, [])),
            has_more=job_id in cut,
        )
    return changes


_COLUMNS = [column for name, column in Job.__table__.columns.items() if name not in UNSEEN | {"id", "project_id"}]


def _rows(session: Session, job_ids: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Return comparable rows by job id: project, number of the last event, and the columns visible to watchers."""
    last = select(func.max(JobEvent.seq)).where(JobEvent.job_id == Job.id).scalar_subquery()
    shown = select(Job.id, Job.project_id, func.coalesce(last, 0), *_COLUMNS).where(Job.id.in_(job_ids))
    return {row[0]: tuple(row[1:]) for row in session.execute(shown)}


def _jobs(session: Session, job_ids: Sequence[str]) -> dict[str, Job]:
    """Return jobs by id. They are read before the events, as in `poll`."""
    if not job_ids:
        return {}
    return {job.id: job for job in session.scalars(select(Job).where(Job.id.in_(job_ids)))}


def _events(session: Session, after: Mapping[str, int]) -> tuple[dict[str, list[JobEvent]], set[str]]:
    """Return the next events after each job's number, by job, and the ids of jobs that may have more."""
    found: dict[str, list[JobEvent]] = {}
    cut: set[str] = set()
    pairs = list(after.items())
    for i in range(0, len(pairs), JOBS_OF_EVENTS):
        some = pairs[i : i + JOBS_OF_EVENTS]
        newer = or_(*(and_(JobEvent.job_id == job_id, JobEvent.seq > seq) for job_id, seq in some))
        ordered = select(JobEvent).where(newer).order_by(JobEvent.job_id, JobEvent.seq)
        events = session.scalars(ordered.limit(MAX_ROWS)).all()
        for event in events:
            found.setdefault(event.job_id, []).append(event)
        if len(events) == MAX_ROWS:
            cut |= {job_id for job_id, _ in some}
    return found, cut


def _last_of(events: Sequence[JobEvent], otherwise: int) -> int:
    return events[-1].seq if events else otherwise


def _in_order(events: Sequence[JobEvent], points: Sequence[Point]) -> list[JobEvent | Point]:
    """Merge events and points. A point has the number of the first event of its write, and precedes that event."""
    items: list[JobEvent | Point] = [*events, *points]
    return sorted(items, key=_place)


def _place(item: JobEvent | Point) -> tuple[int, int, int]:
    return (item.seq, 1, 0) if isinstance(item, JobEvent) else (item.seq, 0, item.step)
