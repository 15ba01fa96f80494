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
from catalog.tasks import task_queue
from catalog.tasks.outcomes import TaskSubject
from catalog.tasks.task_queue import TaskClaim


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


def begin(db: Database, task: TaskClaim, *, worker_id: str) -> tuple[Job, FilesToPrepare]:
    """Return the job of a claimed task and the files to prepare. Raises StaleClaim."""
    with db.write() as session:
        job = task_queue.hold(session, task, Job)
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


def _fail_job(session: Session, job: Job, error: ErrorText, is_refused: bool) -> None:
    """is_refused: the files can't be trained on."""
    job.error = error.as_job_error()
    reason = EndReason.USER_ERROR if is_refused else EndReason.INFRA_LOST
    message, now = f"The job failed. {error.sentence()}", read_clock(session)
    move(session, job, Verb.REFUSED, now=now, message=message, reason=reason, level="error")


def _postpone_job(session: Session, job: Job, error: ErrorText | None, run_after: float | None) -> None:
    detail = error.sentence() if error is not None else "The worker is shutting down."
    message = f"Tokenization of the files will be retried: {detail}"
    job.worker_id, job.run_after = None, run_after
    events.add(session, job.id, now=read_clock(session), level="warn", message=message)


PREPARATION = TaskSubject(table=Job, lost="preparation_lost", fail=_fail_job, postpone=_postpone_job)
