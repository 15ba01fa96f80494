"""Submits jobs that catalog/admission/accept.py has validated. A repeated submission returns the existing job."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from catalog import failpoints, tracing
from catalog.admission.accept import accept, job_row, resolve_targets
from catalog.admission.target_layers import Targets, retried
from catalog.audit import log
from catalog.db.database import Database, read_clock, serialized_at
from catalog.errors import Conflict, InvalidRequest
from catalog.history import events, tracker_runs
from catalog.jobs import commands, reproduction
from catalog.jobs.reproduction import Reproduction
from catalog.lifecycle.transitions import begin
from catalog.plans.jobs_from_plans import AgreedPlan, accept_planned, agree
from catalog.spec.job import FleetDefaults, JobRequest, PlannedJob
from catalog.storage import quota
from catalog.tables.jobs import IdempotencyKey, Job
from catalog.tenancy.authentication import Caller, check_valid
from catalog.usage import ledger, quotas

CLIENT_RETRY_SECONDS = 600
"""For this long, an identical body that the client marks as a retry counts as the same submission."""
MAX_KEY_CHARS = 255


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sent:
    """Identification of a repeated submission. The fields are arguments of `create`."""

    idempotency_key: str | None
    body_digest: str
    is_client_retry: bool


def create(
    db: Database,
    *,
    caller: Caller,
    request: JobRequest | PlannedJob | Reproduction,
    idempotency_key: str | None = None,
    body_digest: str,
    is_client_retry: bool = False,
) -> Job:
    """Create a job, or return the job that the same submission has already created.

    idempotency_key: unique per submission, without expiry. Raises Conflict if it was used with another body.
    is_client_retry: the client marks the request as a retry after a lost response.
    """
    check_idempotency_key(idempotency_key)
    sent = _Sent(idempotency_key=idempotency_key, body_digest=body_digest, is_client_retry=is_client_retry)
    agreed = agree(db, caller, request) if isinstance(request, PlannedJob) else request
    return retried(lambda: _create(db, caller, agreed, sent))


def _create(db: Database, caller: Caller, request: JobRequest | AgreedPlan | Reproduction, sent: _Sent) -> Job:
    """Create a job in one transaction. Raises TargetsOutdated."""
    idempotency_key, body_digest = sent.idempotency_key, sent.body_digest
    targets = resolve_targets(db, caller, [request if isinstance(request, JobRequest) else request.request])
    with db.write() as session:
        name = f"submit {caller.project_id} {idempotency_key or caller.api_key_id + body_digest}"
        now = serialized_at(session, name)
        earlier = _same_submission(session, caller, idempotency_key, body_digest, sent.is_client_retry, now=now)
        if earlier is not None:
            return earlier
        check_valid(session, caller.api_key_id, now=now)
        job = submit(session, caller, request, targets, body_digest=body_digest, now=now)
        if idempotency_key is not None:
            key = IdempotencyKey(project_id=caller.project_id, key=idempotency_key, job_id=job.id)
            key.body_digest, key.created_at = body_digest, now
            session.flush()  # insert the job's row first: the key references it
            session.add(key)
        failpoints.pass_by("submit_before_commit")
    failpoints.pass_by("submit_after_commit")
    return job


def made_before(
    db: Database, *, caller: Caller, idempotency_key: str | None, body_digest: str, is_client_retry: bool
) -> Job | None:
    """Return the job of an earlier, equal submission. Raises Conflict if the key was used with another body."""
    if idempotency_key is None and not is_client_retry:
        return None  # no submission can repeat an earlier one, so this needs no transaction
    with db.read() as session:
        now = read_clock(session)
        return _same_submission(session, caller, idempotency_key, body_digest, is_client_retry, now=now)


def check_idempotency_key(key: str | None) -> None:
    if key is not None and not 1 <= len(key) <= MAX_KEY_CHARS:
        raise InvalidRequest(
            "idempotency_key_too_long" if key else "idempotency_key_empty",
            num_key=len(key),
            max_key_chars=MAX_KEY_CHARS,
            param="Idempotency-Key",
        )


def key_reused(key: str, made: str) -> Conflict:
    """Return the error. `made`: what the earlier request created, for example "job ftjob-1"."""
    return Conflict("idempotency_key_reused", key=key, made=made, param="Idempotency-Key")


def _same_submission(
    session: Session,
    caller: Caller,
    idempotency_key: str | None,
    body_digest: str,
    is_client_retry: bool,
    *,
    now: float,
) -> Job | None:
    if idempotency_key is not None:
        used = session.get(IdempotencyKey, (caller.project_id, idempotency_key))
        if used is None:
            return None
        if used.body_digest != body_digest:
            raise key_reused(idempotency_key, f"job {used.job_id}")
        return session.get_one(Job, used.job_id)
    if not is_client_retry:
        return None
    same = select(Job).where(
        Job.created_by == caller.api_key_id,
        Job.project_id == caller.project_id,
        Job.created_at > now - CLIENT_RETRY_SECONDS,
        Job.body_digest == body_digest,
    )
    return session.scalar(same.order_by(Job.created_at.desc()).limit(1))


def submit(
    session: Session,
    caller: Caller,
    request: JobRequest | AgreedPlan | Reproduction,
    targets: Targets,
    *,
    body_digest: str | None,
    now: float,
    sweep_id: str | None = None,
    fleet_defaults: FleetDefaults | None = None,
) -> Job:
    """Create a job within a transaction.

    targets: the result of `resolve_targets`, called before the transaction. body_digest: None if clients do not retry
    the submission on their own. sweep_id: the job is a trial of this sweep, which the key's quota already counts.
    fleet_defaults: see `accept`. Raises the errors of `accept` and `job_row`.
    """
    quotas.check_submission(session, caller, now=now, is_promised=sweep_id is not None)
    if isinstance(request, AgreedPlan):
        accepted = accept_planned(session, caller, request, now=now)
    elif isinstance(request, Reproduction):
        accepted = reproduction.accept_reproduction(session, caller, request, now=now)
    else:
        seed = secrets.randbelow(2**31)
        accepted = accept(session, caller, request, now=now, seed=seed, fleet_defaults=fleet_defaults)
    quotas.check_priority(session, caller, accepted.request.priority)
    job = job_row(accepted, targets, project_id=caller.project_id, created_by=caller.api_key_id, now=now)
    job.body_digest, job.sweep_id, job.trace = body_digest, sweep_id, tracing.current()
    job.reproduces = request.as_column() if isinstance(request, Reproduction) else None
    begin(session, job, now=now, message=f"Created fine-tuning job: {job.id}")
    quota.check_preparation(session, job, now=now)
    commands.index_labels(session, job)
    ledger.add(session, job, "num_created", 1, now=now)
    details = {"model": job.base_model, "training_file": job.training_file, "method": accepted.spec.method}
    details |= {"plan": request.plan} if isinstance(request, AgreedPlan) else {}
    details |= {"sweep": sweep_id} if sweep_id else {}
    details |= {"reproduces": request.adapter} if isinstance(request, Reproduction) else {}
    log.note(session, "job.created", now=now, object_id=job.id, project_id=job.project_id, details=details)
    tracker_runs.add(session, job, accepted.request.integrations or ())
    if isinstance(request, AgreedPlan):
        events.add(session, job.id, now=now, message=f"The job was created from {request.plan} without changes.")
    if isinstance(request, Reproduction):
        message = f"The job reproduces adapter {request.name} from its lineage record."
        events.add(session, job.id, now=now, message=message)
    for caution in accepted.cautions:
        events.add(session, job.id, now=now, level="warn", message=caution.sentence())
    return job
