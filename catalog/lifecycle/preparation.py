"""Preparation: workers tokenize a job's files before it is queued. It is a background task, and not an attempt.

`transitions` adds the task when the job enters `validating_files`, and deletes it when the job leaves that state.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.orm import Session

from catalog.db.database import Database, read_clock
from catalog.error_texts import ErrorText
from catalog.history import events
from catalog.lifecycle import queue_position
from catalog.lifecycle.transitions import move
from catalog.resources import requirements
from catalog.spec import job_warnings
from catalog.spec.job import JobSpec, evaluations_too_late, interval_exceeds, is_decided_by_evaluations
from catalog.states import EndReason, Verb
from catalog.tables.jobs import Job
from catalog.tables.storage import BaseModelRow, File, Prepared
from catalog.tables.table import Json
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskClaim

RETRY_SECONDS = 10.0
"""Wait after a full disk or an unreachable store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FilesToPrepare:
    """The files of a job or a plan."""

    project_id: str
    base: BaseModelRow
    base_digest: str
    spec: JobSpec
    training: File
    train_key: str
    """Key of the token cache in the table `prepared`."""
    validation: File | None
    valid_key: str | None


def begin(db: Database, task: TaskClaim, *, worker_id: str) -> tuple[Job, FilesToPrepare] | None:
    """Return the job of a claimed task and the files to prepare. Raises StaleClaim.

    Returns None if the workers of all attempts were lost. Then the job has failed.
    """
    with db.write() as session:
        job = task_queue.hold(session, task, Job)
        if task.is_exhausted:
            _fail(session, job, lost(task.num_attempts - 1).as_job_error(), reason=EndReason.INFRA_LOST)
            return None
        job.worker_id, job.run_after = worker_id, None
        return job, FilesToPrepare(
            project_id=job.project_id,
            base=session.get_one(BaseModelRow, job.base_model),
            base_digest=job.base_digest,
            spec=JobSpec.model_validate(job.spec),
            training=session.get_one(File, job.training_file),
            train_key=job.train_prepared,
            validation=session.get_one(File, job.validation_file) if job.validation_file else None,
            valid_key=job.valid_prepared,
        )


def finish(db: Database, task: TaskClaim, *, num_steps: int, longest_example: int | None = None) -> None:
    """Queue a job whose token caches are stored. longest_example: in tokens, if known. Raises StaleClaim."""
    with db.write() as session:
        job = task_queue.hold(session, task, Job)
        now = read_clock(session)
        job.num_steps, job.longest_example = num_steps, longest_example
        requirements.note(session, job)
        queue_position.settle(session, job)
        move(session, job, Verb.PREPARED, now=now, message="Files validated, moving job to queued state")
        spec = JobSpec.model_validate(job.spec)
        if is_decided_by_evaluations(spec) and interval_exceeds(spec, num_steps):
            # Fewer rows are usable than estimated at submission, which would have rejected the job otherwise.
            events.add(session, job.id, now=now, level="warn", message=evaluations_too_late(spec, num_steps).message)
        cache = session.get(Prepared, job.train_prepared)
        usable_rows = cache.report.get("usable_rows") if cache else None
        if (few := job_warnings.few_steps(spec, num_steps, usable_rows=usable_rows)) is not None:
            events.add(session, job.id, now=now, level="warn", message=few.sentence())


def refuse(db: Database, task: TaskClaim, *, error: Json) -> None:
    """Fail a job whose files can't be trained on. `error` has code, message (with its remedy) and param.

    Raises StaleClaim.
    """
    with db.write() as session:
        job = task_queue.hold(session, task, Job)
        _fail(session, job, {"param": "training_file", **error}, reason=EndReason.USER_ERROR)


def release(db: Database, task: TaskClaim, *, detail: str, wait_seconds: float = 0) -> None:
    """Release a job without preparing it, because the worker drains or the store did not answer. Raises StaleClaim."""
    with db.write() as session:
        job = task_queue.hold(session, task, Job)
        task_queue.release_in(session, task, wait_seconds=wait_seconds)
        _note_retry(session, job, detail, run_after=read_clock(session) + wait_seconds if wait_seconds else None)


def retry(db: Database, task: TaskClaim, *, error: Json) -> None:
    """Release a job whose preparation failed because of the files, the base model or the worker.

    These causes can't be distinguished, so another worker retries. The last attempt fails the job.

    error: code, message (with its remedy) and param, with which the job then fails. Raises StaleClaim.
    """
    with db.write() as session:
        job = task_queue.hold(session, task, Job)
        if task_queue.retry(session, task):
            wait_seconds = task_queue.retry_wait(task.num_attempts)
            _note_retry(session, job, error["message"], run_after=read_clock(session) + wait_seconds)
        else:
            message = f"Tokenization of the files failed {task.num_attempts} times. {error['message']}"
            _fail(session, job, {**error, "message": message}, reason=EndReason.INFRA_LOST)


def lost(number: int) -> ErrorText:
    return ErrorText.of("preparation_lost", num_attempts=number, param="training_file")


def _note_retry(session: Session, job: Job, detail: str, *, run_after: float | None) -> None:
    job.worker_id, job.run_after, now = None, run_after, read_clock(session)
    events.add(session, job.id, now=now, level="warn", message=f"Tokenization of the files will be retried: {detail}")


def _fail(session: Session, job: Job, error: Json, *, reason: EndReason) -> None:
    job.error = error
    message, now = f"The job failed. {error['message']}", read_clock(session)
    move(session, job, Verb.REFUSED, now=now, message=message, reason=reason, level="error")
