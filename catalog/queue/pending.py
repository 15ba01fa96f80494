"""Checks for waiting work: base models to import, files to tokenize, plans, jobs to train, inference requests, and
exports."""

from __future__ import annotations

from sqlalchemy import Select, or_, select

from catalog.db import lease
from catalog.db.database import Database, read_clock
from catalog.states import JobState
from catalog.tables.inference import MAX_CLAIMS, InferenceRequest
from catalog.tables.jobs import Job
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskKind

WORKER_TASKS = (TaskKind.IMPORT, TaskKind.PLAN, TaskKind.PREPARATION, TaskKind.EXPORT)


def has_work(db: Database) -> bool:
    """Whether there is work that an idle worker could start now."""
    with db.read() as session:
        now = read_clock(session)
        is_due = or_(Job.run_after.is_(None), Job.run_after <= now)
        jobs = select(Job.id).where(Job.state == JobState.QUEUED, ~Job.is_held, is_due).limit(1)
        tasks = task_queue.due(WORKER_TASKS, now=now).limit(1)
        return any(session.scalar(some) is not None for some in (jobs, tasks, first_request(now=now)))


def first_request(*, now: float) -> Select[InferenceRequest]:
    """An inference request that a worker may claim now."""
    is_free = (lease.is_free(InferenceRequest, now=now), InferenceRequest.num_claims < MAX_CLAIMS)
    return select(InferenceRequest).where(*is_free, InferenceRequest.expires_at > now).limit(1)
