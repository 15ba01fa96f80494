"""A worker's operations on a claim: renew, start, end and complete it. claiming.py creates claims.

A claim gives one job to one worker, and its id is the fencing token of every later write. If no job has that id, the
write raises StaleClaim, because another attempt may have the job, and the worker writes nothing more.
catalog/lifecycle/recording.py uses the same fence.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from catalog import failpoints
from catalog.db.database import Database, read_clock
from catalog.errors import LorryError
from catalog.fleet import cordons
from catalog.history import events, result_files
from catalog.lifecycle import recovery, trials
from catalog.lifecycle.outcomes import close_attempt, end_attempt
from catalog.lifecycle.recording import (
    Course,
    held_out_point,
    hold,
    record_course,
)
from catalog.lifecycle.transitions import move
from catalog.queue import charging, preemption
from catalog.registry import lineage_comparison
from catalog.scheduling.snapshot import USUAL, Policy
from catalog.states import ENDINGS, EndReason, JobState, Verb
from catalog.storage.manifest import Manifest, show_artifact
from catalog.storage.store import Blob
from catalog.tables.fleet import Worker
from catalog.tables.history import Attempt
from catalog.tables.jobs import Job
from catalog.tables.storage import Adapter
from catalog.tables.table import Json, new_id
from catalog.tables.tenancy import Project
from catalog.usage import ledger

log = logging.getLogger("lorry.catalog")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClaimDirectives:
    """Instructions for the worker about the job of one claim."""

    cancel: bool = False
    pause: bool = False
    preempt: bool = False
    """Save a checkpoint and release the job, because an urgent job needs its memory."""
    stale: bool = False
    """The claim is no longer valid: stop the job and write nothing."""


def heartbeat(
    db: Database, *, worker_id: str, claim_ids: Collection[str], lease_seconds: float, policy: Policy = USUAL
) -> dict[str, ClaimDirectives]:
    """Renew the leases of the claims that are still valid, and return their directives.

    Also charges the running jobs, and then checks whether jobs must be preempted.
    """
    recovery.observe(db, lease_seconds=lease_seconds)
    with db.write() as session:
        now = read_clock(session)
        session.execute(update(Worker).where(Worker.id == worker_id).values(heartbeat_at=now))
        rows = select(Job).where(Job.claim_id.in_(claim_ids)).order_by(Job.id).with_for_update()
        directives = dict.fromkeys(claim_ids, ClaimDirectives(stale=True))
        claimed = list(session.scalars(rows))
        charging.charge_beat(session, claimed, session.get(Worker, worker_id), now=now, policy=policy)
        for job in claimed:
            job.lease_expires_at, job.lease_extended = now + lease_seconds, False
            directives[job.claim_id or ""] = _directives(job)
    if _request_preemptions(db, policy) or any(each.preempt for each in directives.values()):
        return _read_directives(db, claim_ids)
    return directives


def _request_preemptions(db: Database, policy: Policy) -> int:
    """Return the number of preempted jobs. A failure here loses no lease, because the leases are already renewed."""
    try:
        return preemption.request_preemptions(db, policy=policy)
    except LorryError as error:
        log.warning("preemption code=%s", error.code)
    except Exception:  # the next heartbeat retries
        log.exception("crash in preemption")
    return 0


def _read_directives(db: Database, claim_ids: Collection[str]) -> dict[str, ClaimDirectives]:
    with db.read() as session:
        claimed = session.scalars(select(Job).where(Job.claim_id.in_(claim_ids)))
        return dict.fromkeys(claim_ids, ClaimDirectives(stale=True)) | {
            job.claim_id or "": _directives(job) for job in claimed
        }


def _directives(job: Job) -> ClaimDirectives:
    is_preempted = job.preempted_for is not None
    return ClaimDirectives(cancel=job.cancel_requested, pause=job.pause_requested, preempt=is_preempted)


def started(
    db: Database,
    claim_id: str,
    *,
    trainer_id: str,
    resumed_from_step: int | None,
    strategy: tuple[str, Json] | None = None,
) -> None:
    """Record that the trainer has admitted the job.

    strategy: how the trainer holds the base model, as an event: (message, data).
    """
    with db.write() as session:
        job = hold(session, claim_id)
        now = read_clock(session)
        attempt = session.get_one(Attempt, claim_id)
        job.trainer_id = attempt.trainer_id = trainer_id
        attempt.resumed_from_step = resumed_from_step
        job.started_at = job.started_at or now
        message = (
            f"Fine-tuning resumed from step {resumed_from_step}" if resumed_from_step else "Fine-tuning job started"
        )
        data = {"attempt": job.attempt, "trainer_id": trainer_id, "resumed_from_step": resumed_from_step}
        events.add(session, job.id, now=now, message=message, data=data)
        if strategy is not None:
            events.add(session, job.id, now=now, message=strategy[0], data=strategy[1])


def complete(
    db: Database,
    claim_id: str,
    *,
    artifact: Manifest,
    num_parameters: int,
    verification: Json,
    evaluation: Json | None,
    trained_tokens: int,
    course: Course,
    curves: Blob,
    lineage: Json,
    lineage_id: str,
    policy: Policy = USUAL,
) -> Adapter:
    """Complete the job and publish its adapter in one transaction. A cancel request that is still pending is ignored.

    curves: the stored content of the job's result file, which is published too.
    """
    _settle(db, claim_id, policy)
    with db.write() as session:
        job = hold(session, claim_id)
        now = read_clock(session)
        adapter = Adapter(
            id=new_id("adapter"),
            name=_adapter_name(session, job),
            job_id=job.id,
            project_id=job.project_id,
            base_model=job.base_model,
            base_digest=job.base_digest,
            artifact=show_artifact(session, artifact, now=now),
            num_parameters=num_parameters,
            verification=verification,
            evaluation=evaluation,
            lineage=lineage,
            lineage_id=lineage_id,
            created_at=now,
        )
        session.add(adapter)
        charging.charge_end(session, job, now=now, policy=policy)
        close_attempt(session, job, reason=EndReason.COMPLETED, detail=course.stopped_early, now=now)
        record_course(session, job, course, now=now)
        trials.completed(session, job, held_out_point(session, job, course.kept_step))
        result_files.record(session, job, curves, now=now)
        job.adapter_name, job.trained_tokens, job.error = adapter.name, trained_tokens, None
        message = f"New fine-tuned model created: {adapter.name}"
        events.add(session, job.id, now=now, message=message, data={"adapter_id": adapter.id})
        _compare_reproduction(session, job, lineage, now=now)
        ledger.add(session, job, "trained_tokens", trained_tokens, now=now)
        ledger.count(session, "trained_tokens", number=trained_tokens)
        ledger.count(session, "adapters")
        ledger.store(session, job.project_id, artifact.num_bytes + curves.num_bytes, now=now)
        done = "The job has successfully completed"
        move(session, job, Verb.COMPLETE, now=now, message=done, reason=EndReason.COMPLETED)
        session.flush()
        failpoints.pass_by("in_complete")
        return adapter


def _compare_reproduction(session: Session, job: Job, lineage: Json, *, now: float) -> None:
    """Record whether the adapter is identical to the one that the job reproduces, if it reproduces one."""
    if job.reproduces is None:
        return
    recorded = session.get_one(Adapter, job.reproduces["adapter"]).lineage
    verdict = lineage_comparison.compare(job.reproduces["expected"], recorded=recorded, reproduced=lineage)
    job.reproduction = verdict
    level = "info" if verdict["identical"] else "warn"
    events.add(session, job.id, now=now, level=level, message=verdict["message"], data={"reproduction": verdict})


def end(
    db: Database,
    claim_id: str,
    *,
    reason: EndReason,
    detail: str,
    error: Json | None = None,
    is_bystander: bool = False,
    blamed_worker_id: str | None = None,
    policy: Policy = USUAL,
) -> JobState:
    """End an attempt that produced no adapter. Returns the job's next state, which ENDINGS determines.

    is_bystander: the trainer exited before it had started the job, so the end does not count against the job.
    blamed_worker_id: see Attempt.
    """
    _settle(db, claim_id, policy)
    with db.write() as session:
        job = hold(session, claim_id)
        worker_id, now = job.worker_id, read_clock(session)
        charging.charge_end(session, job, now=now, policy=policy)
        session.get_one(Attempt, claim_id).blamed_worker_id = blamed_worker_id
        state = end_attempt(session, job, reason=reason, detail=detail, error=error, is_bystander=is_bystander, now=now)
    if ENDINGS[reason].may_be_nodes:
        cordons.cordon_if_bad(db, worker_id if blamed_worker_id is None else blamed_worker_id)
    return state


def _settle(db: Database, claim_id: str, policy: Policy) -> None:
    """Charge the trainer's jobs up to now, before one of them leaves and the others' fractions grow."""
    with db.read() as session:
        trainer_id = session.scalar(select(Attempt.trainer_id).where(Attempt.claim_id == claim_id))
    if trainer_id is not None:
        charging.settle(db, trainer_id, policy=policy)


def _adapter_name(session: Session, job: Job) -> str:
    """A free adapter name, `ft:BASE:PROJECT:SUFFIX:ID`. ID is the end of the job's id, unless that name is in use."""
    project = session.get_one(Project, job.project_id)
    stem = f"ft:{job.base_model}:{project.name}:{job.suffix or ''}"
    name = f"{stem}:{job.id[-8:]}"
    while session.scalar(select(Adapter.id).where(Adapter.name == name)) is not None:
        name = f"{stem}:{new_id('x')[-8:]}"
    return name
