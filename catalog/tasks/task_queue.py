"""The queue of background tasks: exports, plans, imports of base models, webhooks and others.

A transaction that creates work adds its task, and the one that stores the result deletes it. In between, processes
claim tasks that are due. A claim is a lease (catalog/db/lease.py): each write of its holder begins with `hold`, which
fails once the task was deleted or another process has claimed it. Then the late process changes nothing.

Lock order: a transaction locks the subject before its task. `claim` locks only the task.

Training jobs have claims of their own (catalog/queue), because the scheduler chooses them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import TypeVar

from sqlalchemy import ColumnElement, Select, and_, delete, func, or_, select
from sqlalchemy.orm import DeclarativeBase, Session

from catalog.db import lease
from catalog.db.database import Database, at_the_end, lower, read_clock, serialized_at, skip_locked, upsert
from catalog.errors import StaleClaim
from catalog.tables.fleet import Worker
from catalog.tables.tasks import Task, TaskTurn

SubjectT = TypeVar("SubjectT", bound=DeclarativeBase)
FIRST_WAIT_SECONDS = 10.0
"""Wait after the first failed attempt."""
MAX_WAIT_SECONDS = 3600.0
AGING_SECONDS = 3600.0
"""A task counts as one class higher for each AGING_SECONDS that it has waited, unless settings differ."""


class TaskKind(StrEnum):
    IMPORT = "base_model_import"
    PLAN = "plan"
    PREPARATION = "preparation"
    """Tokenizes the files of a job."""
    EXPORT = "export"
    LOAD = "load"
    """Loads a base model that inference requests wait for."""
    BATCH = "batch"
    ENDPOINT = "serving_endpoint"
    """Keeps the server in step with its deployments, as long as the endpoint exists."""
    WEBHOOK = "webhook"
    """Sends the deliveries of an endpoint that are due, as long as it has pending ones."""
    TRACK_WANDB = "tracker_run:wandb"
    TRACK_MLFLOW = "tracker_run:mlflow"
    TRACK_TENSORBOARD = "tracker_run:tensorboard"
    """Writes the curves of a job to its run in a tracker, while the job trains and until its end is written."""


MAX_ATTEMPTS: Mapping[TaskKind, int] = {
    TaskKind.IMPORT: 5,
    TaskKind.PLAN: 5,
    TaskKind.PREPARATION: 5,
    TaskKind.EXPORT: 3,
    TaskKind.LOAD: 3,
    **dict.fromkeys((TaskKind.TRACK_WANDB, TaskKind.TRACK_MLFLOW, TaskKind.TRACK_TENSORBOARD), 8),
}
"""Attempts that may fail, or lose their process, before the work fails: it may be the cause."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskClaim:
    """A task that this process works on."""

    claim_id: str
    kind: TaskKind
    subject: str
    num_attempts: int
    """Number of this attempt, from 1."""

    @property
    def is_exhausted(self) -> bool:
        """All attempts were made before, and the process of the last one was lost."""
        return self.num_attempts > MAX_ATTEMPTS[self.kind]


def add(
    session: Session, kind: TaskKind, subject: str, *, project_id: str | None, run_after: float, priority: int = 0
) -> None:
    """Add a task that is due at `run_after`. If it exists, it is due then at the latest."""
    row = {"kind": kind, "subject": subject, "project_id": project_id, "run_after": run_after}
    lower(session, Task, {**row, "priority": priority, "num_attempts": 0}, "run_after")


def add_at_the_end(session: Session, kind: TaskKind, subject: str, *, project_id: str, run_after: float) -> None:
    """Add the task just before the transaction commits.

    For tasks of subjects that the transaction has not locked: all transactions then lock such tasks in one order.
    """
    of_task = {"kind": kind, "subject": subject, "project_id": project_id, "run_after": run_after}
    at_the_end(session, f"task {kind} {subject}", partial(add, **of_task))


def remove(session: Session, kind: TaskKind, subject: str) -> None:
    """Delete the task of a subject, which the caller has locked. A process that has claimed it stops when it renews its
    lease."""
    session.execute(delete(Task).where(Task.kind == kind, Task.subject == subject))


def due(kinds: Collection[TaskKind], *, now: float) -> Select[Task]:
    """Select tasks that a process may claim now."""
    return select(Task).where(Task.kind.in_(kinds), Task.run_after <= now, lease.is_free(Task, now=now))


def claim(
    db: Database,
    kinds: Collection[TaskKind],
    *,
    lease_seconds: float,
    worker_id: str | None = None,
    skipping: Collection[str] = (),
    subject: str | None = None,
    skipping_projects: Collection[str] = (),
    aging_seconds: float = AGING_SECONDS,
) -> TaskClaim | None:
    """Claim the next due task; None if there is none. Projects and kinds take turns, so that no project's tasks wait
    behind all those of another. A project's tasks of one kind are claimed in the order of `place`.

    worker_id: a worker that is draining or cordoned gets none. skipping, skipping_projects: subjects and projects that
    are left to other processes. subject: only its task is claimed; None: that of any subject.
    """
    is_wanted = Task.subject.not_in(skipping) if subject is None else Task.subject == subject
    if skipping_projects:
        is_wanted &= or_(Task.project_id.is_(None), Task.project_id.not_in(skipping_projects))
    with db.read() as session:  # most polls find nothing, and a read transaction blocks no writer
        open_tasks = due(kinds, now=read_clock(session)).where(is_wanted)
        if session.scalar(open_tasks.limit(1)) is None:
            return None
    with db.write() as session:
        now = serialized_at(session, "claim a task")  # otherwise two processes would claim for the same project
        worker = session.get(Worker, worker_id) if worker_id is not None else None
        if worker is not None and worker.takes_nothing_new:
            return None
        is_of_project = and_(TaskTurn.kind == Task.kind, TaskTurn.project_id == Task.project_id)
        in_turn = due(kinds, now=now).where(is_wanted).outerjoin(TaskTurn, is_of_project)
        turn = func.coalesce(TaskTurn.claimed_at, 0.0)
        order = (turn, place(aging_seconds), Task.kind, Task.subject)
        task = session.scalar(skip_locked(in_turn.order_by(*order).limit(1), of=Task))
        if task is None:
            return None
        if task.project_id is not None:
            upsert(session, TaskTurn, [{"kind": task.kind, "project_id": task.project_id, "claimed_at": now}])
        task.num_attempts += 1
        return TaskClaim(
            claim_id=lease.acquire(task, now=now, lease_seconds=lease_seconds, prefix="task"),
            kind=TaskKind(task.kind),
            subject=task.subject,
            num_attempts=task.num_attempts,
        )


def place(aging_seconds: float) -> ColumnElement[float]:
    """Return the sort key of a project's tasks of one kind: when they were due, and later for lower classes."""
    return Task.run_after + Task.priority * aging_seconds


def progress(session: Session, claimed: TaskClaim, *, lease_seconds: float) -> None:
    """Extend the lease, and forget earlier failed attempts. Raises StaleClaim."""
    task = hold_task(session, claimed)
    task.num_attempts, task.lease_expires_at = 1, read_clock(session) + lease_seconds


def renew(db: Database, claimed: TaskClaim, *, lease_seconds: float) -> bool:
    """Extend the lease. Returns False if the claim is stale."""
    return lease.renew(db, Task, claimed.claim_id, lease_seconds=lease_seconds)


def hold(session: Session, claimed: TaskClaim, table: type[SubjectT]) -> SubjectT:
    """Return the subject of the claimed task, both locked until the transaction ends. Raises StaleClaim."""
    subject = session.get(table, claimed.subject, with_for_update=True, populate_existing=True)
    hold_task(session, claimed)
    if subject is None:
        raise StaleClaim(claimed.claim_id)
    return subject


def finish(session: Session, claimed: TaskClaim) -> None:
    """Delete the task, because its work has ended. Raises StaleClaim."""
    session.delete(hold_task(session, claimed))


def release(db: Database, claimed: TaskClaim, *, wait_seconds: float = 0.0) -> None:
    """Let another process do the work, for a reason that does not concern it: the attempt does not count.

    Raises StaleClaim.
    """
    with db.write() as session:
        release_in(session, claimed, wait_seconds=wait_seconds)


def release_in(session: Session, claimed: TaskClaim, *, wait_seconds: float = 0.0) -> None:
    task = hold_task(session, claimed)
    task.num_attempts -= 1
    task.run_after = read_clock(session) + wait_seconds
    lease.release(task)


def retry(session: Session, claimed: TaskClaim) -> bool:
    """Schedule another attempt after a failed one. Returns False if this was the last: the caller ends the work.

    Raises StaleClaim.
    """
    task = hold_task(session, claimed)
    if task.num_attempts >= MAX_ATTEMPTS[claimed.kind]:
        session.delete(task)
        return False
    task.run_after = read_clock(session) + retry_wait(task.num_attempts)
    lease.release(task)
    return True


def retry_wait(num_attempts: int) -> float:
    """Return the seconds before the next attempt after `num_attempts` failed ones: 10, 30, 90, …, at most an hour.

    Without a wait, one bad worker, which is idle again immediately, would use up all attempts while good ones are busy.
    """
    return min(FIRST_WAIT_SECONDS * 3.0 ** (num_attempts - 1), MAX_WAIT_SECONDS)


def hold_task(session: Session, claimed: TaskClaim) -> Task:
    """Return the claimed task, locked until the transaction ends. The caller has locked its subject. Raises
    StaleClaim."""
    task = lease.held(session, Task, claimed.claim_id)
    if task is None:
        raise StaleClaim(claimed.claim_id)
    return task
