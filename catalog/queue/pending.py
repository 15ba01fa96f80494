"""Checks for waiting work: base models to import or to load, files to tokenize, plans, jobs to train, and exports."""

from __future__ import annotations

from sqlalchemy import or_, select

from catalog.db.database import Database, read_clock
from catalog.states import JobState
from catalog.tables.jobs import Job
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskKind

WORKER_TASKS = (TaskKind.IMPORT, TaskKind.PLAN, TaskKind.PREPARATION, TaskKind.EXPORT, TaskKind.LOAD)


def has_work(db: Database) -> bool:
    """Whether there is work that an idle worker could start now."""
    with db.read() as session:
        now = read_clock(session)
        is_due = or_(Job.run_after.is_(None), Job.run_after <= now)
        jobs = select(Job.id).where(Job.state == JobState.QUEUED, ~Job.is_held, is_due).limit(1)
        tasks = task_queue.due(WORKER_TASKS, now=now).limit(1)
        return any(session.scalar(some) is not None for some in (jobs, tasks))
