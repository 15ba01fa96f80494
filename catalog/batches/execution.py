"""An API process's operations on a batch that it has claimed: submit its requests, store their results, and end it.

Each write names the claim. After another process has taken over a batch, the late process writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from catalog.db.database import Database, read_clock
from catalog.errors import StaleClaim
from catalog.storage.files import BATCH_OUTPUT
from catalog.storage.store import Blob
from catalog.tables.serving import Batch, BatchLine
from catalog.tables.storage import File
from catalog.tables.table import Json, new_id
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskClaim, TaskKind
from catalog.usage import ledger

BATCH_LEASE_SECONDS = 60.0
"""Lease of a batch, renewed by the process that works on it."""
DELETED_AT_ONCE = 1000
"""Number of results that one transaction deletes."""
Outcome = Literal["completed", "cancelled", "expired", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchClaim:
    """A batch that this process works on."""

    task: TaskClaim
    batch_id: str
    project_id: str
    endpoint: str
    input_digest: str
    """Digest of the content of the input file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Directive:
    """The state of a batch, by which the process that holds it decides how to continue."""

    status: str
    is_expired: bool
    seconds_left: float
    num_lines: int


def claim(db: Database) -> BatchClaim | None:
    """Claim the next batch. Returns None if none waits."""
    task = task_queue.claim(db, [TaskKind.BATCH], lease_seconds=BATCH_LEASE_SECONDS)
    if task is None:
        return None
    with db.read() as session:
        batch = session.get_one(Batch, task.subject)
        return BatchClaim(
            task=task,
            batch_id=batch.id,
            project_id=batch.project_id,
            endpoint=batch.endpoint,
            input_digest=session.get_one(File, batch.input_file).digest,
        )


def is_any_waiting(db: Database) -> bool:
    """Return whether there is an unfinished batch that no process works on."""
    with db.read() as session:
        waiting = task_queue.due([TaskKind.BATCH], now=read_clock(session))
        return session.scalar(waiting.limit(1)) is not None


def renew(db: Database, claimed: BatchClaim) -> Directive:
    """Extend the lease, and return the state of the batch. Raises StaleClaim."""
    if not task_queue.renew(db, claimed.task, lease_seconds=BATCH_LEASE_SECONDS):
        raise StaleClaim(claimed.task.claim_id)
    with db.read() as session:
        batch = session.get_one(Batch, claimed.batch_id)
        seconds_left = batch.expires_at - read_clock(session)
        return Directive(
            status=batch.status, is_expired=seconds_left <= 0, seconds_left=seconds_left, num_lines=batch.num_lines
        )


def release(db: Database, claimed: BatchClaim) -> None:
    """Let another process continue the batch. The project's other batches are next. Raises StaleClaim."""
    task_queue.release(db, claimed.task)


def begin(db: Database, claimed: BatchClaim, *, num_lines: int) -> None:
    """Record that the input is valid. Raises StaleClaim."""
    with db.write() as session:
        batch = _held(session, claimed)
        batch.num_lines = num_lines
        if batch.status == "validating":
            batch.status, batch.in_progress_at = "in_progress", read_clock(session)


def fail(db: Database, claimed: BatchClaim, errors: Sequence[Json], *, num_lines: int = 0) -> None:
    """End the batch, because its input is invalid. Raises StaleClaim."""
    with db.write() as session:
        batch = _held(session, claimed)
        batch.status, batch.finished_at = "failed", read_clock(session)
        batch.errors, batch.num_lines = list(errors), num_lines
        task_queue.finish(session, claimed.task)


def store_result(
    db: Database,
    claimed: BatchClaim,
    *,
    number: int,
    base_model: str | None,
    result: Json,
    is_failed: bool,
    request_id: str,
    prompt_tokens: int,
    completion_tokens: int,
) -> None:
    """Store the result of one line and count its tokens, in one transaction.

    base_model: whose tokens are counted. None: the line has no model. Raises StaleClaim. Then another process answers
    the line again, and only that answer is counted.
    """
    with db.write() as session:
        batch = _held(session, claimed)
        if session.get(BatchLine, (batch.id, number)) is not None:
            return  # an earlier call was committed, but its reply was lost
        session.add(BatchLine(batch_id=batch.id, number=number, is_failed=is_failed, result=result))
        batch.num_failed += is_failed
        batch.num_completed += not is_failed
        if base_model is not None:
            _count(session, batch, base_model, request_id, (prompt_tokens, completion_tokens))


def count_interrupted(
    db: Database,
    claimed: BatchClaim,
    *,
    base_model: str,
    request_id: str,
    prompt_tokens: int,
    completion_tokens: int,
) -> None:
    """Count the tokens of a partial answer, whose line will have no result. Raises StaleClaim."""
    with db.write() as session:
        batch = _held(session, claimed)
        _count(session, batch, base_model, request_id, (prompt_tokens, completion_tokens))


def _count(session: Session, batch: Batch, base_model: str, request_id: str, tokens: tuple[int, int]) -> None:
    """tokens: of the prompt and of the answer. 0 of the prompt: no engine has begun to answer."""
    prompt_tokens, completion_tokens = tokens
    if not prompt_tokens:
        return
    batch.prompt_tokens += prompt_tokens
    batch.completion_tokens += completion_tokens
    ledger.add_completion(
        session,
        project_id=batch.project_id,
        base_model=base_model,
        request_id=request_id,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        now=read_clock(session),
    )


def finished_lines(db: Database, batch_id: str) -> set[int]:
    """Return the numbers of the lines that have a result."""
    with db.read() as session:
        return set(session.scalars(select(BatchLine.number).where(BatchLine.batch_id == batch_id)))


def results(db: Database, batch_id: str, *, after: int, limit: int) -> list[BatchLine]:
    """Return the next results in the order of the lines."""
    following = (BatchLine.batch_id == batch_id, BatchLine.number > after)
    with db.read() as session:
        return list(session.scalars(select(BatchLine).where(*following).order_by(BatchLine.number).limit(limit)))


def finalize(db: Database, claimed: BatchClaim) -> None:
    """Record that no more lines are answered. Raises StaleClaim."""
    with db.write() as session:
        batch = _held(session, claimed)
        if batch.status == "in_progress":
            batch.status = "finalizing"
        batch.finalizing_at = batch.finalizing_at or read_clock(session)


def end(
    db: Database,
    claimed: BatchClaim,
    outcome: Outcome,
    *,
    output: Blob | None,
    failures: Blob | None,
    error: Json | None = None,
) -> None:
    """Create the rows of the output and the error file, and end the batch. Raises StaleClaim.

    error: why the batch has failed. Then the lines without a result count as failed. The quota of stored bytes is not
    checked, so that no answer is lost. The bytes count, as those of other files do.
    """
    with db.write() as session:
        batch, now = _held(session, claimed), read_clock(session)
        batch.output_file = _add_file(session, batch, output, name="output", now=now)
        batch.error_file = _add_file(session, batch, failures, name="error", now=now)
        batch.status, batch.finished_at = outcome, now
        if error is not None:
            batch.errors, batch.num_failed = [error], batch.num_lines - batch.num_completed
        task_queue.finish(session, claimed.task)


def delete_results(db: Database) -> int:
    """Delete some results of batches that have ended. Returns their number; 0 if none is left."""
    ended = select(Batch.id).where(Batch.finished_at.is_not(None))
    some = select(BatchLine.batch_id, BatchLine.number).where(BatchLine.batch_id.in_(ended)).limit(DELETED_AT_ONCE)
    with db.write() as session:
        found = session.execute(some).all()
        numbers: dict[str, list[int]] = {}
        for batch_id, number in found:
            numbers.setdefault(batch_id, []).append(number)
        for batch_id, of_batch in numbers.items():
            which = (BatchLine.batch_id == batch_id, BatchLine.number.in_(of_batch))
            session.execute(delete(BatchLine).where(*which))
        return len(found)


def _held(session: Session, claimed: BatchClaim) -> Batch:
    return task_queue.hold(session, claimed.task, Batch)


def _add_file(session: Session, batch: Batch, content: Blob | None, *, name: str, now: float) -> str | None:
    if content is None:
        return None
    file = File(
        id=new_id("file"),
        project_id=batch.project_id,
        purpose=BATCH_OUTPUT,
        filename=f"{batch.id}_{name}.jsonl",
        num_bytes=content.num_bytes,
        num_rows=None,
        kind=None,
        digest=content.digest,
        created_at=now,
        expires_at=None if batch.lifetime_seconds is None else now + batch.lifetime_seconds,
    )
    session.add(file)
    session.flush()  # before the batch refers to it
    ledger.store(session, batch.project_id, content.num_bytes, now=now)
    return file.id
