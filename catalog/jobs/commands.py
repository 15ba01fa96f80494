"""User commands on jobs. Jobs of other projects raise NotFound.

Submission is in `submission`, and explanations of a job's state are in `explanation`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Select, select
from sqlalchemy.orm import Session, aliased

from catalog.audit import log
from catalog.audit.log import AuditType
from catalog.db.database import Database, read_clock
from catalog.db.pagination import Page, paginate
from catalog.errors import Conflict
from catalog.history import events
from catalog.history.queries import (
    find,
)
from catalog.lifecycle.transitions import move
from catalog.resources import requirements
from catalog.states import FINAL_STATES, EndReason, JobState, Verb
from catalog.tables.jobs import WITHOUT_METADATA, Job, JobLabel
from catalog.tables.storage import Prepared
from catalog.usage import quotas


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """A kind of request to stop a job: how to stop it immediately, and how to ask its worker."""

    verb: Verb
    audited: AuditType
    reason: EndReason
    flag: Literal["cancel_requested", "pause_requested"]
    done: str
    request_message: str


CANCEL = Stop(
    verb=Verb.CANCEL,
    audited="job.cancelled",
    reason=EndReason.CANCELLED_BY_USER,
    flag="cancel_requested",
    done="The job was cancelled.",
    request_message="Cancellation was requested; the worker stops the job.",
)
PRUNE = Stop(
    verb=Verb.CANCEL,
    audited="trial.stopped",
    reason=EndReason.PRUNED,
    flag="cancel_requested",
    done="The trial was stopped.",
    request_message="A stop of the trial was requested.",
)
PAUSE = Stop(
    verb=Verb.PAUSE,
    audited="job.paused",
    reason=EndReason.PAUSED_BY_USER,
    flag="pause_requested",
    done="The job was paused.",
    request_message="A pause was requested. The worker saves a checkpoint first.",
)


def get(db: Database, *, project_id: str, job_id: str) -> Job:
    """Return the project's job. Raises NotFound."""
    with db.read() as session:
        return find(session, project_id, job_id)


def list_page(
    db: Database,
    *,
    project_id: str,
    after: str | None = None,
    limit: int = 20,
    metadata: dict[str, str] | None = None,
    tags: Sequence[str] = (),
) -> Page[Job]:
    """Return a page of jobs, newest first.

    metadata: only jobs whose metadata contain all of these pairs; {} selects jobs without metadata. tags: only jobs
    with all of these tags. after: the id of a job that matches these filters.
    """
    wanted = label_digests(metadata or {}, tags)
    scope, created, ident = select(Job).where(Job.project_id == project_id), Job.created_at, Job.id
    if wanted:
        scope, created, ident = jobs_with_labels(project_id, wanted), JobLabel.created_at, JobLabel.job_id
    scope = scope.where(WITHOUT_METADATA) if metadata == {} else scope
    with db.read() as session:
        return paginate(session, scope, created=created, ident=ident, after=after, limit=limit)


def cancel(db: Database, *, project_id: str, job_id: str, is_client_retry: bool = False) -> Job:
    """Cancel the job: immediately if no worker trains it, otherwise as soon as its worker has stopped it.

    is_client_retry: the client marks the request as a retry after a lost response. Then a job that is already cancelled
    is returned without an error.
    """
    with db.write() as session:
        job = find(session, project_id, job_id, locked=True)
        if not (is_client_retry and job.state == JobState.CANCELLED):
            stop(session, job, CANCEL, now=read_clock(session))
        return job


def pause(db: Database, *, project_id: str, job_id: str) -> Job:
    """Pause the job. It saves a checkpoint, at which it can be resumed. Pausing a paused job does nothing."""
    with db.write() as session:
        job = find(session, project_id, job_id, locked=True)
        if job.cancel_requested:
            raise Conflict("job_canceling", job=job.id)
        if job.state != JobState.PAUSED:
            stop(session, job, PAUSE, now=read_clock(session))
        return job


def resume(db: Database, *, project_id: str, job_id: str, is_client_retry: bool = False) -> Job:
    """Resume a paused job. It is queued immediately if its files are already prepared.

    is_client_retry: see `cancel`. Then a job that is already resumed is returned without an error.
    """
    with db.write() as session:
        job = find(session, project_id, job_id, locked=True)
        now = read_clock(session)
        if job.state in FINAL_STATES:
            raise _already_final(job)
        if job.state == JobState.RUNNING and job.pause_requested and not job.cancel_requested:
            job.pause_requested = False
            events.add(session, job.id, now=now, message="The pause was revoked. The job continues.")
            _note(session, "job.resumed", job, now=now)
            return job
        if job.state != JobState.PAUSED:
            if is_client_retry and not job.cancel_requested:
                return job
            if job.cancel_requested:
                raise Conflict("job_cancelling", job=job.id)
            if job.is_held:
                raise Conflict("job_held", job=job.id, state=job.state)
            raise Conflict("job_not_paused", job=job.id, state=job.state)
        quotas.check_resumption(session, job.project_id, now=now)
        _note(session, "job.resumed", job, now=now)
        move(session, job, Verb.RESUME, now=now, message="The job was resumed.")
        job.counted_attempts = job.lost_attempts = 0
        job.resumed_at = now
        if _is_prepared(session, job):
            requirements.note(session, job)
            session.flush()
            move(session, job, Verb.PREPARED, now=now, message="The files are already tokenized. The job was queued.")
        return job


def stop(session: Session, job: Job, request: Stop, *, now: float) -> None:
    """Stop the job immediately if no worker trains it; otherwise ask its worker, once.

    Raises Conflict if the job is in a final state.
    """
    if job.state in FINAL_STATES:
        raise _already_final(job)
    if job.state == JobState.RUNNING and getattr(job, request.flag):
        return
    _note(session, request.audited, job, now=now)
    if job.state != JobState.RUNNING:
        move(session, job, request.verb, now=now, message=request.done, reason=request.reason)
    else:
        setattr(job, request.flag, True)
        events.add(session, job.id, now=now, message=request.request_message)


def _note(session: Session, type: AuditType, job: Job, *, now: float) -> None:  # noqa: A002
    log.note(session, type, now=now, object_id=job.id, project_id=job.project_id, details={"from": job.state})


def _is_prepared(session: Session, job: Job) -> bool:
    caches = [session.get(Prepared, key) for key in (job.train_prepared, job.valid_prepared) if key]
    return job.num_steps is not None and all(cache is not None and cache.artifact for cache in caches)


def _already_final(job: Job) -> Conflict:
    return Conflict("job_already_final", job=job.id, state=job.state)


def label_digests(metadata: Mapping[str, str], tags: Sequence[str]) -> list[str]:
    """Return one digest per label. Equal labels of different jobs have equal digests."""
    labels = [["metadata", key, value] for key, value in metadata.items()]
    labels += [["tag", tag] for tag in tags]
    return list(dict.fromkeys(hashlib.sha256(json.dumps(label).encode()).hexdigest() for label in labels))


def index_labels(session: Session, job: Job) -> None:
    """Add the labels of a new job to the index. The job's row is already stored."""
    for label in label_digests(job.labels or {}, job.tags or []):
        session.add(JobLabel(job_id=job.id, label=label, project_id=job.project_id, created_at=job.created_at))


def jobs_with_labels(project_id: str, wanted: Sequence[str]) -> Select[Job]:
    """Select the project's jobs that have all of these labels. The first label is looked up in the index."""
    first, *others = wanted
    found = select(Job).join(JobLabel, JobLabel.job_id == Job.id)
    found = found.where(JobLabel.project_id == project_id, JobLabel.label == first)
    for label in others:
        other = aliased(JobLabel)
        found = found.where(select(other.job_id).where(other.job_id == Job.id, other.label == label).exists())
    return found
