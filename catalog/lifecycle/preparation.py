"""Preparation: workers tokenize a job's files before it is queued. A preparation has a lease, but is no attempt."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from catalog.db import lease
from catalog.db.database import Database, read_clock, serialize
from catalog.history import events
from catalog.lifecycle import candidates, queue_position
from catalog.lifecycle.fencing import hold
from catalog.lifecycle.transitions import move
from catalog.resources import requirements
from catalog.scheduling.ordering import first_to_prepare
from catalog.scheduling.snapshot import USUAL, Policy
from catalog.spec import evaluation_schedule, job_warnings
from catalog.spec.job import JobSpec
from catalog.states import EndReason, JobState, Verb
from catalog.tables.fleet import Worker
from catalog.tables.jobs import Job
from catalog.tables.storage import BaseModelRow, File, Prepared
from catalog.tables.table import Json
from catalog.tables.tenancy import Project

VALIDATING = JobState.VALIDATING_FILES
MAX_LOST_PREPARATIONS = 5
"""Failed preparations after which the job fails: its worker was lost, or may be at fault for the failure. (They are not
attempts.)"""
RETRY_SECONDS = 10.0
"""Wait after the first failed preparation, and after a full disk or an unreachable store."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizationClaim:
    """A job whose files this worker prepares, with the inputs."""

    claim_id: str
    job: Job
    files: FilesToPrepare


def next_unprepared(
    db: Database, *, worker_id: str, lease_seconds: float, policy: Policy = USUAL
) -> TokenizationClaim | None:
    """Lease the first job whose files wait for preparation to this worker. Returns None if there is none.

    `claims.heartbeat` renews the lease, like that of a claim.
    """
    with db.read() as session:  # most polls find no job, and a read transaction blocks no writer
        if not candidates.to_prepare(session, now=read_clock(session)):
            return None
    with db.write() as session:
        serialize(session, "take files to prepare")
        now = read_clock(session)
        worker = session.get(Worker, worker_id, with_for_update=True)
        if worker is not None and worker.takes_nothing_new:
            return None
        job = _take_first(session, now=now, policy=policy)
        if job is None:
            return None
        project = session.get_one(Project, job.project_id)
        project.preparing_at = now
        project.class_prepared_at = {**(project.class_prepared_at or {}), str(job.priority): now}
        claim_id = lease.acquire(job, now=now, lease_seconds=lease_seconds, prefix="prep")
        job.worker_id, job.lease_extended = worker_id, False
        files = FilesToPrepare(
            project_id=job.project_id,
            base=session.get_one(BaseModelRow, job.base_model),
            base_digest=job.base_digest,
            spec=JobSpec.model_validate(job.spec),
            training=session.get_one(File, job.training_file),
            train_key=job.train_prepared,
            validation=session.get_one(File, job.validation_file) if job.validation_file else None,
            valid_key=job.valid_prepared,
        )
        return TokenizationClaim(claim_id=claim_id, job=job, files=files)


def _take_first(session: Session, *, now: float, policy: Policy) -> Job | None:
    """Return the first job to prepare, locked. Skips jobs that users cancel or pause at the same time.

    The caller serializes workers, so only users can interfere.
    """
    while found := candidates.to_prepare(session, now=now):
        first = first_to_prepare(found, now, policy=policy)
        job = session.scalar(
            select(Job).where(Job.id == first.job_id, *candidates.is_unprepared(Job, now)).with_for_update()
        )
        if job is not None:
            return job
    return None


def prepared(db: Database, *, claim_id: str, num_steps: int, longest_example: int | None = None) -> None:
    """Queue a job whose token caches are stored. longest_example: in tokens, if known."""
    with db.write() as session:
        job = hold(session, claim_id, state=VALIDATING)
        now = read_clock(session)
        job.num_steps, job.longest_example = num_steps, longest_example
        job.lost_preparations = 0
        requirements.note(session, job)
        queue_position.settle(session, job)
        move(session, job, Verb.PREPARED, now=now, message="Files validated, moving job to queued state")
        spec = JobSpec.model_validate(job.spec)
        if evaluation_schedule.decide(spec) and evaluation_schedule.interval_is_too_long(spec, num_steps):
            # Fewer rows are usable than estimated at submission, which would have rejected the job otherwise.
            events.add(session, job.id, now=now, level="warn", message=evaluation_schedule.too_late(spec, num_steps))
        cache = session.get(Prepared, job.train_prepared)
        usable_rows = cache.report.get("usable_rows") if cache else None
        if (few := job_warnings.few_steps(spec, num_steps, usable_rows=usable_rows)) is not None:
            events.add(session, job.id, now=now, level="warn", message=few.sentence())


def refused(db: Database, *, claim_id: str, error: Json) -> None:
    """Fail a job whose files can't be trained on. `error` has code, message (with its remedy) and param."""
    with db.write() as session:
        job = hold(session, claim_id, state=VALIDATING)
        job.error = {"param": "training_file", **error}
        message = f"The job failed. {error['message']}"
        now = read_clock(session)
        move(session, job, Verb.REFUSED, now=now, message=message, reason=EndReason.USER_ERROR, level="error")


def release_preparation(db: Database, *, claim_id: str, detail: str, wait_seconds: float = 0) -> None:
    """Release a job without preparing it, because the worker drains or the store did not answer."""
    with db.write() as session:
        job = hold(session, claim_id, state=VALIDATING)
        now = read_clock(session)
        free(job)
        job.run_after = now + wait_seconds if wait_seconds else None
        events.add(
            session, job.id, now=now, level="warn", message=f"Tokenization of the files will be retried: {detail}"
        )


def fail_preparation(db: Database, *, claim_id: str, error: Json) -> None:
    """Release a job whose preparation failed because of the files, the base model or the worker.

    These causes can't be distinguished, so another worker retries. After MAX_LOST_PREPARATIONS the job fails.

    error: code, message (with its remedy) and param, with which the job then fails.
    """
    with db.write() as session:
        job = hold(session, claim_id, state=VALIDATING)
        now = read_clock(session)
        job.lost_preparations += 1
        if job.lost_preparations >= MAX_LOST_PREPARATIONS:
            message = f"Tokenization of the files failed {job.lost_preparations} times. {error['message']}"
            _give_up(session, job, {**error, "message": message}, now=now)
            return
        _retry(session, job, error["message"], now=now)


def retry_wait(number: int) -> float:
    """Return the seconds before the next attempt after `number` failed ones. They triple each time.

    Without this wait, one bad worker, which is idle again immediately, would use up all attempts while good ones are
    busy.
    """
    return RETRY_SECONDS * 3 ** (number - 1)


def _retry(session: Session, job: Job, detail: str, *, now: float) -> None:
    free(job)
    job.run_after = now + retry_wait(job.lost_preparations)
    events.add(session, job.id, now=now, level="warn", message=f"Tokenization of the files will be retried: {detail}")


def lose_preparation(session: Session, job: Job, *, detail: str, now: float) -> None:
    """Release a job whose preparing worker was lost, or fail it after MAX_LOST_PREPARATIONS. Its row is locked."""
    job.lost_preparations += 1
    if job.lost_preparations < MAX_LOST_PREPARATIONS:
        _retry(session, job, detail, now=now)
        return
    message = lost(job.lost_preparations)
    _give_up(session, job, {"code": "preparation_lost", "message": message, "param": "training_file"}, now=now)


def lost(number: int) -> str:
    return (
        f"Tokenization of the files failed {number} times. The last time, its worker was lost. Once the workers run "
        "normally, create the job or plan again."
    )


def _give_up(session: Session, job: Job, error: Json, *, now: float) -> None:
    job.error = error
    failed = f"The job failed. {error['message']}"
    move(session, job, Verb.REFUSED, now=now, message=failed, reason=EndReason.INFRA_LOST, level="error")


def free(job: Job) -> None:
    """Release the preparation lease of the job, whose row is locked."""
    lease.release(job)
    job.worker_id, job.lease_extended = None, False
