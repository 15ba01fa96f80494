"""What is new about jobs since the last look: for streams, which look again and again.

Whoever writes an event or points holds the job's row: what is written of a job is committed in the order of its
numbers, so that "after this number" misses nothing. Between jobs there is no such order, and none is relied on.
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
"""Metrics from so long ago are told to a watcher that is new."""
MAX_ROWS = 1000
"""Events in one look; the next goes on."""
JOBS_A_QUESTION, JOBS_OF_EVENTS = 500, 20
"""Of which one question asks how they look, and for their events."""
UNSEEN = frozenset({"requested", "spec", "body_digest", "labels", "lease_expires_at", "charged_at", "device_seconds"})
"""Columns of a job in which nothing changes, or what does is not for watchers."""


@dataclass(kw_only=True, slots=True)
class Mark:
    """How far one watcher has got."""

    project_id: str
    job_id: str
    seq: int
    """The last event told, and of what is not told the last that was passed over."""
    quiet_until: int = 0
    """Metrics (events and points) up to this number are not told: they are of the time before the watcher came."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobChanges:
    job: Job
    items: list[JobEvent | Point]
    """In the order in which they were written: the points of a write, then its events."""
    has_more: bool
    """There was more than fits one look."""

    @property
    def events(self) -> list[JobEvent]:
        return [item for item in self.items if isinstance(item, JobEvent)]

    @property
    def points(self) -> list[Point]:
        return [item for item in self.items if isinstance(item, Point)]


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchedJob:
    """What is known of a job that several watch: how far its events were told, and how its row looked."""

    seq: int
    row: tuple[Any, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What is new about one of many jobs."""

    seen: WatchedJob
    job: Job
    items: list[JobEvent | Point]
    has_more: bool


def start(db: Database, *, project_id: str, job_id: str, last_seen: int | None) -> Mark:
    """Begin to watch after the event `last_seen`, or at the job's first event.

    A watcher that comes back is told what was committed after that event, and nothing again. One that is new is told
    the messages from the first, and metrics (events and points) from a few seconds ago: it reads the whole curve for
    itself once. Raises NotFound.
    """
    with db.read() as session:
        find(session, project_id, job_id)
        mark = Mark(project_id=project_id, job_id=job_id, seq=last_seen or 0)
        seen = session.get(JobEvent, last_seen) if last_seen else None
        if seen is None or seen.job_id != job_id:
            old = (JobEvent.job_id == job_id, JobEvent.created_at < clock_of(session) - RECENT_SECONDS)
            mark.quiet_until = session.scalar(select(func.max(JobEvent.seq)).where(*old)) or 0
        return mark


def look(db: Database, mark: Mark) -> JobChanges:
    """What is new, and `mark` moved on past it."""
    with db.read() as session:
        job = find(session, mark.project_id, mark.job_id)  # before the events: a final job comes after all of its
        is_shown = or_(JobEvent.type != "metrics", JobEvent.seq > mark.quiet_until)
        newer = select(JobEvent).where(JobEvent.job_id == mark.job_id, JobEvent.seq > mark.seq, is_shown)
        events = list(session.scalars(newer.order_by(JobEvent.seq).limit(MAX_ROWS)))
        has_more = len(events) == MAX_ROWS
        told, known = max(mark.seq, mark.quiet_until), _last_of(events, mark.seq)
        points: list[Point] = []
        if known > told:
            found = metric_store.written(session, {mark.job_id: told})
            points = [point for _, point in found if point.seq <= known]
        mark.seq = known if has_more else max(known, mark.quiet_until)
        return JobChanges(job=job, items=_in_order(events, points), has_more=has_more)


def look_at_many(db: Database, seen: Mapping[tuple[str, str], WatchedJob]) -> dict[tuple[str, str], Change | None]:
    """By (project, job), of those about which anything is new. None: there is no such job.

    What it asks for doesn't grow with how many watch; a job about which nothing is new costs no question of its own.
    """
    changes: dict[tuple[str, str], Change | None] = {}
    keys = list(seen)
    for i in range(0, len(keys), JOBS_A_QUESTION):
        with db.read() as session:
            changes |= _changes(session, {key: seen[key] for key in keys[i : i + JOBS_A_QUESTION]})
    return changes


def newest_event(db: Database) -> int:
    """Of any job: another number means that something has happened. One with a lower number may be seen later, for
    transactions end in any order: whoever waits for it looks now and then all the same."""
    with db.read() as session:
        return session.scalar(select(func.max(JobEvent.seq))) or 0


def _changes(session: Session, seen: Mapping[tuple[str, str], WatchedJob]) -> dict[tuple[str, str], Change | None]:
    rows = _rows(session, [job_id for _, job_id in seen])
    found = {key: row if (row := rows.get(key[1])) is not None and row[0] == key[0] else None for key in seen}
    moved = {key: row for key, row in found.items() if row is not None and row != seen[key].row}
    jobs = _jobs(session, [job_id for _, job_id in moved])
    since = {job_id: seen[project_id, job_id].seq for project_id, job_id in moved}
    # A job that ended after the first question has its last events since then: nobody looks again.
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
            # What was left over is looked for again: the row will look new.
            seen=WatchedJob(seq=known[job_id], row=None if job_id in cut else row),
            job=jobs[job_id],
            items=_in_order(events.get(job_id, []), points.get(job_id, [])),
            has_more=job_id in cut,
        )
    return changes


_COLUMNS = [column for name, column in Job.__table__.columns.items() if name not in UNSEEN | {"id", "project_id"}]


def _rows(session: Session, job_ids: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """How each job looks, all of it comparable: its project, the number of its last event, what watchers may see."""
    last = select(func.max(JobEvent.seq)).where(JobEvent.job_id == Job.id).scalar_subquery()
    shown = select(Job.id, Job.project_id, func.coalesce(last, 0), *_COLUMNS).where(Job.id.in_(job_ids))
    return {row[0]: tuple(row[1:]) for row in session.execute(shown)}


def _jobs(session: Session, job_ids: Sequence[str]) -> dict[str, Job]:
    """Read before the events, as in `look`."""
    if not job_ids:
        return {}
    return {job.id: job for job in session.scalars(select(Job).where(Job.id.in_(job_ids)))}


def _events(session: Session, after: Mapping[str, int]) -> tuple[dict[str, list[JobEvent]], set[str]]:
    """By job: the next of those after its number; and the jobs that may have more."""
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
    """A point's number is that of the first event it came with, and is told before it."""
    items: list[JobEvent | Point] = [*events, *points]
    return sorted(items, key=_place)


def _place(item: JobEvent | Point) -> tuple[int, int, int]:
    return (item.seq, 1, 0) if isinstance(item, JobEvent) else (item.seq, 0, item.step)
