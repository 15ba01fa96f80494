"""Ends attempts at background tasks that have no result: the work fails, is tried again, or is left to another process.

The module of the subject records a result, in one transaction with `task_queue.finish`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic

from sqlalchemy.orm import Session

from catalog.db.database import Database, read_clock
from catalog.error_texts import ErrorText
from catalog.tasks import task_queue
from catalog.tasks.task_queue import SubjectT, TaskClaim


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSubject(Generic[SubjectT]):
    """A table whose rows have tasks of one kind, and what the end of an attempt changes in a row."""

    table: type[SubjectT]
    lost: str
    """Name of the error text if the process of each attempt was lost. Its value `number` is the number of attempts."""
    fail: Callable[[Session, SubjectT, ErrorText, bool], None]
    """Record the failure of the work. The last argument: whether every attempt would fail. Otherwise the processes may
    be the cause."""
    postpone: Callable[[Session, SubjectT, ErrorText | None, float | None], None]
    """Record that another attempt follows. Arguments: the row, the error of this attempt (None: its process exits), and
    when the next one is due (None: now)."""


def fail(db: Database, claimed: TaskClaim, subject: TaskSubject[SubjectT], error: ErrorText) -> None:
    """Fail the work, because every attempt would fail. Raises StaleClaim."""
    _fail(db, claimed, subject, error, is_refused=True)


def fail_lost(db: Database, claimed: TaskClaim, subject: TaskSubject[SubjectT]) -> None:
    """Fail the work of a claim that is exhausted. Raises StaleClaim."""
    error = ErrorText.of(subject.lost, number=claimed.num_attempts - 1)
    _fail(db, claimed, subject, error, is_refused=False)


def retry(db: Database, claimed: TaskClaim, subject: TaskSubject[SubjectT], error: ErrorText) -> None:
    """Let a process try again, because this one may be the cause of the error. The last attempt fails the work.

    Raises StaleClaim.
    """
    with db.write() as session:
        row = task_queue.hold(session, claimed, subject.table)
        if task_queue.retry(session, claimed):
            wait_seconds = task_queue.retry_wait(claimed.num_attempts)
            subject.postpone(session, row, error, read_clock(session) + wait_seconds)
        else:
            message = f"{error.message} All {claimed.num_attempts} attempts have failed."
            subject.fail(session, row, replace(error, message=message), False)


def release(
    db: Database,
    claimed: TaskClaim,
    subject: TaskSubject[SubjectT],
    error: ErrorText | None = None,
    *,
    wait_seconds: float = 0.0,
) -> None:
    """Let another process do the work: this one exits, or needs something that `error` describes. The attempt does not
    count. Raises StaleClaim."""
    with db.write() as session:
        row = task_queue.hold(session, claimed, subject.table)
        task_queue.release_in(session, claimed, wait_seconds=wait_seconds)
        subject.postpone(session, row, error, read_clock(session) + wait_seconds if wait_seconds else None)


def _fail(
    db: Database, claimed: TaskClaim, subject: TaskSubject[SubjectT], error: ErrorText, *, is_refused: bool
) -> None:
    with db.write() as session:
        row = task_queue.hold(session, claimed, subject.table)
        task_queue.finish(session, claimed)
        subject.fail(session, row, error, is_refused)
