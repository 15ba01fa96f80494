"""A job's events: what a person reads. Written inside the transaction of what they tell of."""

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
"""As people are told: a transition is a message."""


def add(
    session: Session,
    job_id: str,
    *,
    now: float,
    message: str,
    level: Level = "info",
    type: EventType = "message",  # noqa: A002  (the wire's word)
    data: Json | None = None,
) -> JobEvent:
    """Append one event to the job's log. It has its number once the session is flushed."""
    event = JobEvent(job_id=job_id, created_at=now, level=level, type=type, message=message, data=data)
    session.add(event)
    return event


def answered_steps(db: Database, job_id: str) -> list[int]:
    """Steps at which the job's prompts were answered, by what its events hold."""
    wanted = JobEvent.job_id == job_id, JobEvent.type == "message", JobEvent.data.is_not(None)
    with db.read() as session:
        found = session.scalars(select(JobEvent.data).where(*wanted)).all()
    return sorted({int(data["step"]) for data in found if data and "samples" in data})
