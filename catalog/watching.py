"""What is new about one job since the last look: for streams, which look again and again.

Whoever writes an event holds the job's row: a job's events are committed in the order of their numbers. A
point of a curve may be written again, so every look at the curves goes back a little further than the last,
and leaves out what it has told already.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from catalog.db import Database, read_clock
from catalog.job_records import find
from catalog.tables import Job, JobEvent, Metric

STEP_OVERLAP = 64
"""How far back in a curve a look goes again."""
CLOCK_OVERLAP_SECONDS = 10.0
KINDS = ("train", "valid")
MAX_ROWS = 1000
"""Events, and points of each kind, in one look; the next goes on."""


@dataclass(kw_only=True, slots=True)
class Mark:
    """How far one watcher has got."""

    project_id: str
    job_id: str
    seq: int
    """The last event told."""
    quiet_until: int = 0
    """Events of type `metrics` up to this number are not told: they are of the time before the watcher came."""
    since: float = 0.0
    """Points of curves written before this time are not told."""
    attempt: int = -1
    steps: dict[str, int] = field(default_factory=dict[str, int])
    """Furthest point told, by kind of curve."""
    told_points: set[tuple[str, int, float]] = field(default_factory=set[tuple[str, int, float]])


@dataclass(frozen=True, kw_only=True, slots=True)
class News:
    job: Job
    events: list[JobEvent]
    """Oldest first."""
    points: list[Metric]
    has_more: bool
    """There was more than fits one look."""


def start(db: Database, *, project_id: str, job_id: str, last_seen: int | None) -> Mark:
    """Begin to watch after the event `last_seen`, or at the job's first event.

    A watcher that comes back is told what was committed after that event, and nothing again: points and events
    are written under the job's row, and a look tells points before the events that came with them. One that is
    new is told the messages from the first, and metrics (events and points) from a few seconds ago: it reads the
    whole curve for itself once. Raises NotFound.
    """
    with db.read() as session:
        find(session, project_id, job_id)
        mark = Mark(project_id=project_id, job_id=job_id, seq=last_seen or 0)
        seen = session.get(JobEvent, last_seen) if last_seen else None
        if seen is not None and seen.job_id == job_id:
            mark.since = math.nextafter(seen.created_at, math.inf)
        else:
            mark.since = read_clock(session) - CLOCK_OVERLAP_SECONDS
            old = (JobEvent.job_id == job_id, JobEvent.created_at < mark.since)
            mark.quiet_until = session.scalar(select(func.max(JobEvent.seq)).where(*old)) or 0
        return mark


def look(db: Database, mark: Mark) -> News:
    """What is new, and `mark` moved on past it."""
    with db.read() as session:
        now = read_clock(session)
        job = find(session, mark.project_id, mark.job_id)
        if job.attempt != mark.attempt:  # it may train earlier steps again: look at the whole of its curves
            mark.attempt = job.attempt
            mark.steps.clear()
        events = _new_events(session, mark)  # before the points: whatever came with an event is found then
        by_kind = [_new_points(session, mark, kind) for kind in KINDS]
        has_more = max(len(events), *map(len, by_kind)) >= MAX_ROWS
        if max(map(len, by_kind)) >= MAX_ROWS:
            events = []  # they wait until the points before them have been told
        elif events:
            mark.seq = events[-1].seq
        if not has_more:
            mark.since = max(mark.since, now - 6 * CLOCK_OVERLAP_SECONDS)
            mark.told_points = {key for key in mark.told_points if key[2] >= mark.since}
        points = sorted((point for points in by_kind for point in points), key=lambda point: point.step)
        return News(job=job, events=events, points=points, has_more=has_more)


def _new_events(session: Session, mark: Mark) -> list[JobEvent]:
    is_told = or_(JobEvent.type != "metrics", JobEvent.seq > mark.quiet_until)
    newer = select(JobEvent).where(JobEvent.job_id == mark.job_id, JobEvent.seq > mark.seq, is_told)
    return list(session.scalars(newer.order_by(JobEvent.seq).limit(MAX_ROWS)))


def _new_points(session: Session, mark: Mark, kind: str) -> list[Metric]:
    from_step = mark.steps.get(kind, 0) - STEP_OVERLAP
    of_kind = (Metric.job_id == mark.job_id, Metric.kind == kind, Metric.step > from_step)
    newer = select(Metric).where(*of_kind, Metric.created_at >= mark.since).order_by(Metric.step)
    rows = session.scalars(newer.limit(MAX_ROWS + STEP_OVERLAP))
    fresh = [row for row in rows if _key(row) not in mark.told_points][:MAX_ROWS]
    mark.told_points |= {_key(row) for row in fresh}
    if fresh:
        mark.steps[kind] = fresh[-1].step
    return fresh


def _key(row: Metric) -> tuple[str, int, float]:
    return (row.kind, row.step, row.created_at)
