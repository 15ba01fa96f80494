"""Writes the events of a job that users read, in the transaction of the change that each describes."""

from __future__ import annotations

from typing import Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from catalog.db.database import Database
from catalog.tables.history import JobEvent
from catalog.tables.table import Json

Level = Literal["info", "warn", "error"]
EventType = Literal["message", "metrics", "transition"]
ShownType = Literal["message", "metrics"]
"""Event types of the API: transitions are shown as messages."""


def add(
    session: Session,
    job_id: str,
    *,
    now: float,
    message: str,
    level: Level = "info",
    type: EventType = "message",  # noqa: A002  (the API's field name)
    data: Json | None = None,
) -> JobEvent:
    """Append one event to the job's log. Its number is assigned when the session is flushed."""
    event = JobEvent(job_id=job_id, created_at=now, level=level, type=type, message=message, data=data)
    session.add(event)
    return event


def answered_steps(db: Database, job_id: str) -> list[int]:
    """Return the steps at which the job's sample prompts were answered, from its events."""
    wanted = JobEvent.job_id == job_id, JobEvent.type == "message", JobEvent.data.is_not(None)
    with db.read() as session:
        found = session.scalars(select(JobEvent.data).where(*wanted)).all()
    return sorted({int(data["step"]) for data in found if data and "samples" in data})
