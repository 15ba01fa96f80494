"""Workers as people see them, and how many there are of everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from catalog.db import Database, read_clock
from catalog.states import JobState
from catalog.tables import Adapter, BaseModelRow, Job, JobEvent, Worker
from catalog.workers import SILENT_SECONDS, list_workers

WorkerState = Literal["idle", "busy", "draining", "lost", "ended"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerView:
    worker: Worker
    state: WorkerState
    base_names: list[str]
    """Names of the base that it holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    jobs: Mapping[str, int]
    """By state; every state is there."""
    workers: Mapping[str, int]
    """By state, of those seen in the last hour."""
    num_events: int
    """Recorded so far: the last number that was given to one, which costs no scan."""
    adapters: int


def workers(db: Database) -> list[WorkerView]:
    """Those that live, and those that ended or fell silent lately; newest first."""
    rows = list_workers(db)
    with db.read() as session:
        now = read_clock(session)
        held = {row.resident_base for row in rows if row.resident_base}
        names, training = _names(session, held), _training(session)
        return [
            WorkerView(
                worker=row,
                state=state_of(row, is_training=row.id in training, now=now),
                base_names=names.get(row.resident_base or "", []),
            )
            for row in rows
        ]


def state_of(worker: Worker, *, is_training: bool, now: float) -> WorkerState:
    """is_training: it holds a job that is running. A base that stays loaded for the next job is no work."""
    if worker.ended_at is not None:
        return "ended"
    if worker.heartbeat_at <= now - SILENT_SECONDS:
        return "lost"
    if worker.drain_requested:
        return "draining"
    return "busy" if is_training else "idle"


def count(db: Database) -> Counts:
    by_worker = Counter(view.state for view in workers(db))
    with db.read() as session:
        by_state = {row[0]: row[1] for row in session.execute(select(Job.state, func.count()).group_by(Job.state))}
        return Counts(
            jobs={state.value: by_state.get(state.value, 0) for state in JobState},
            workers=dict(by_worker),
            num_events=session.scalar(select(func.max(JobEvent.seq))) or 0,
            adapters=session.scalar(select(func.count()).select_from(Adapter).where(Adapter.deleted_at.is_(None))) or 0,
        )


def _training(session: Session) -> set[str | None]:
    """Ids of the workers that hold a running job."""
    return set(session.scalars(select(Job.worker_id).where(Job.state == JobState.RUNNING).distinct()))


def _names(session: Session, digests: set[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    rows = session.execute(select(BaseModelRow.digest, BaseModelRow.name).where(BaseModelRow.digest.in_(digests)))
    for digest, name in rows:
        found.setdefault(digest or "", []).append(name)
    return found
