"""Predicts whether jobs meet their deadlines. A job that will miss its deadline gets one event, but is not stopped."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, select

from catalog.db.database import Database, read_clock
from catalog.history import events
from catalog.states import JobState
from catalog.tables.jobs import Job

Json = dict[str, Any]
UNFINISHED = (JobState.VALIDATING_FILES, JobState.QUEUED, JobState.RUNNING)


def notify_late(db: Database) -> int:
    """Write an event for each unfinished job that will miss its deadline. Returns their number."""
    with db.read() as session:  # most checks find no job, and a read transaction blocks no writer
        now = read_clock(session)
        found = [job.id for job in session.scalars(_unannounced()) if is_late(job, now)]
    if not found:
        return 0
    with db.write() as session:
        now = read_clock(session)
        rows = select(Job).where(Job.id.in_(found)).order_by(Job.id).with_for_update()
        late = [job for job in session.scalars(rows) if not job.is_late_announced and is_late(job, now)]
        for job in late:
            job.is_late_announced = True
            message = f"The job will miss its deadline. {sentence(job, now)} The job is not stopped."
            events.add(session, job.id, now=now, level="warn", message=message, data=facts(job, now))
        return len(late)


def is_late(job: Job, now: float) -> bool:
    """Whether the job will miss its deadline according to its expected duration."""
    return job.deadline is not None and job.state in UNFINISHED and _expected_end(job, now) > job.deadline


def facts(job: Job, now: float) -> Json:
    """The deadline as data for API responses; {} for a job without a deadline."""
    if job.deadline is None:
        return {}
    return {
        "deadline": job.deadline,
        "needed_start": job.needed_start,
        "expected_end_at_best": round(_expected_end(job, now), 1),
        "is_late": is_late(job, now),
    }


def sentence(job: Job, now: float) -> str | None:
    """The deadline as a sentence for users. None for a job that has no deadline, is paused or has finished."""
    if job.deadline is None or job.state not in UNFINISHED:
        return None
    if job.state == JobState.RUNNING:
        word = "after" if is_late(job, now) else "before"
        return f"The job finishes about {abs(_expected_end(job, now) - job.deadline):.0f} s {word} its deadline."
    remaining = (job.needed_start or job.deadline) - now
    if remaining < 0:
        return f"To meet its deadline, the job should have started {-remaining:.0f} s ago."
    return f"To meet its deadline, the job must start within {remaining:.0f} s."


def _expected_end(job: Job, now: float) -> float:
    """The earliest expected end: if the job starts now, or keeps running."""
    deadline = job.deadline or 0.0
    seconds_left = (job.progress or {}).get("seconds_left") if job.state == JobState.RUNNING else None
    if isinstance(seconds_left, int | float):
        return now + seconds_left
    return now + max(0.0, deadline - (job.needed_start or deadline))


def _unannounced() -> Select[Job]:
    """Unfinished jobs with a deadline and without an event. Uses the index of unfinished jobs' deadlines."""
    unfinished = select(Job).where(Job.deadline > 0, Job.finished_at.is_(None)).order_by(Job.deadline)
    return unfinished.where(Job.is_late_announced.is_(False))
