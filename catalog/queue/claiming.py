"""Claims queued jobs for a worker. `claim_pack` has five steps, which its comments number:

1. End expired leases (recovery.py).
2. Decide without locks. Most calls end here, because no job fits.
3. Take the lock of all claims. Read a snapshot of the queue (snapshot_reader.py), and decide again (scheduler.py).
4. Lock the chosen jobs. If users have canceled or paused the first one meanwhile, return to the decision.
5. Write claim id, lease and attempt.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from sqlalchemy import Select, bindparam, select
from sqlalchemy.orm import Session

from catalog import failpoints
from catalog.db import lease
from catalog.db.database import Database, clock_column, clock_given, read_clock, serialize
from catalog.lifecycle import candidates, recovery
from catalog.lifecycle.recording import resumable
from catalog.lifecycle.transitions import move
from catalog.queue import charging
from catalog.queue.snapshot_reader import snapshot_of
from catalog.scheduling.packing import Choice
from catalog.scheduling.scheduler import Decision, Wait, decide
from catalog.scheduling.snapshot import USUAL, Capacity, Policy
from catalog.states import JobState, Verb
from catalog.tables.fleet import Worker
from catalog.tables.history import Attempt, Checkpoint
from catalog.tables.jobs import Job
from catalog.tables.tenancy import Project
from catalog.usage import ledger, quotas

MAX_TRIES = 5
"""Maximum number of decisions under the lock, while users cancel or pause the chosen jobs."""
CLAIM_LOCK = "take jobs off the queue"
"""Name of an advisory lock of PostgreSQL, under which one worker at a time decides and claims."""

PLACE_OF_ROLE = {
    "anchor": "in a new trainer",
    "packmate": "in a new trainer, together with other jobs",
    "joiner": "in a running trainer",
}
"""The part of the claim event that describes where the job trains, by its role."""
LOADED_PLACE = "in a trainer that has the base model loaded"
"""Replaces the text for an anchor if the worker's idle trainer already has the job's base model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A job that this worker has claimed."""

    job: Job
    claim_id: str
    attempt: int
    waited_since: float
    """When the job entered the queue, in seconds since 1970."""
    resume_candidates: tuple[Checkpoint, ...]
    """Checkpoints to resume from, newest first. An older one is used if a newer one is damaged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _ClaimRequest:
    """The arguments of `claim_pack`."""

    worker_id: str
    trainer_id: str
    capacity: Capacity
    live_key: str | None
    lease_seconds: float
    policy: Policy


CLOSED = Decision(action=Wait(reason="the worker is cordoned or draining"), trace={})


def claim_pack(
    db: Database,
    *,
    worker_id: str,
    trainer_id: str,
    capacity: Capacity,
    lease_seconds: float,
    pack_key: str | None = None,
    policy: Policy = USUAL,
) -> list[Claim]:
    """Claim jobs to train, in queue order. Returns [] if no job fits.

    pack_key: None claims an anchor and its packmates for a new trainer. Otherwise the jobs join the live trainer
    `trainer_id`, which has this pack key. capacity: the worker's free memory and job slots.
    """
    recovery.expire(db, lease_seconds=lease_seconds)  # 1.
    request = _ClaimRequest(
        worker_id=worker_id,
        trainer_id=trainer_id,
        capacity=capacity,
        live_key=pack_key,
        lease_seconds=lease_seconds,
        policy=policy,
    )
    with db.snapshot() as session:  # 2. It blocks no writer.
        if not _decide(session, request).action.choices:
            return []
    failpoints.pass_by("before_claim")
    if pack_key is not None:
        charging.settle(db, trainer_id, policy=policy)
    with db.write() as session:
        serialize(session, CLAIM_LOCK)
        for _ in range(MAX_TRIES):
            decision = _decide(session, request, is_to_lock=True)  # 3.
            if not decision.action.choices:
                return []
            if claims := _claim(session, decision, request):  # 4. and 5.
                return claims
    return []


def _decide(session: Session, request: _ClaimRequest, *, is_to_lock: bool = False) -> Decision:
    """is_to_lock: lock the worker's row, so that a worker that is cordoned or drained meanwhile claims no job."""
    now, worker = _worker(session, request.worker_id, is_to_lock=is_to_lock)
    if worker is not None and worker.takes_nothing_new:
        return CLOSED
    snapshot = snapshot_of(
        session,
        worker,
        trainer_id=request.trainer_id,
        capacity=request.capacity,
        live_key=request.live_key,
        now=now,
        policy=request.policy,
    )
    return decide(snapshot, request.policy)


def _claim(session: Session, decision: Decision, request: _ClaimRequest) -> list[Claim]:
    """Lock the chosen jobs, and claim those that wait and that the quotas of their projects allow to start.

    A pack without its anchor is not claimed: the caller then decides again.
    """
    now, worker = _worker(session, request.worker_id)
    choices = {choice.entry.candidate.job_id: choice for choice in decision.action.choices}
    rows = session.execute(_waiting(), {"ids": sorted(choices), "now": now}).all()
    found = {job.id: job for job, _ in rows}
    jobs = {job_id: found[job_id] for job_id in choices if job_id in found}
    if any(maximum is not None for _, maximum in rows):
        startable = quotas.startable(session, jobs)
        jobs = {job_id: job for job_id, job in jobs.items() if job_id in startable}
    if not jobs or (request.live_key is None and next(iter(choices)) not in jobs):
        return []
    since = {job_id: job.queued_at or job.created_at for job_id, job in jobs.items()}
    for job_id in sorted(jobs):
        _write(session, jobs[job_id], decision, choices[job_id], request, now=now)
    served_classes = [
        (job.project_id, job.priority) for job_id, job in jobs.items() if choices[job_id].entry.is_first_of_class
    ]
    if worker is not None and served_classes:
        charging.record_service(worker, served_classes, now=now, policy=request.policy)
    return [_claim_of(session, job, waited_since=since[job_id]) for job_id, job in jobs.items()]


def _write(
    session: Session, job: Job, decision: Decision, choice: Choice, request: _ClaimRequest, *, now: float
) -> None:
    claim_id = lease.acquire(job, now=now, lease_seconds=request.lease_seconds)
    job.attempt += 1
    job.claimed_at = job.charged_at = now
    job.worker_id, job.trainer_id = request.worker_id, request.trainer_id
    job.lease_extended, job.run_after = False, None
    attempt = Attempt(claim_id=claim_id, job_id=job.id, number=job.attempt, worker_id=job.worker_id)
    attempt.trainer_id, attempt.started_at, attempt.why = request.trainer_id, now, decision.why(choice)
    session.add(attempt)
    ledger.count(session, "claims")
    is_loaded = choice.role == "anchor" and request.capacity.resident_key == choice.entry.candidate.pack_key
    place = LOADED_PLACE if is_loaded else PLACE_OF_ROLE[choice.role]
    move(session, job, Verb.CLAIM, now=now, message=f"Attempt {job.attempt} started on worker {job.worker_id} {place}")


def _claim_of(session: Session, job: Job, *, waited_since: float) -> Claim:
    assert job.claim_id is not None
    checkpoints = resumable(session, job.id) if job.attempt > 1 else ()  # a first attempt has no checkpoints
    return Claim(
        job=job,
        claim_id=job.claim_id,
        attempt=job.attempt,
        waited_since=waited_since,
        resume_candidates=checkpoints,
    )


def _worker(session: Session, worker_id: str, *, is_to_lock: bool = False) -> tuple[float, Worker | None]:
    """Return the database's time and the worker's row, if it exists."""
    given = clock_given(session)
    asked = _time_and_worker(is_clock_given=bool(given), is_to_lock=is_to_lock)
    found = session.execute(asked, {**given, "worker_id": worker_id}).first()
    return (read_clock(session), None) if found is None else (found.now, found.Worker)


@cache
def _time_and_worker(*, is_clock_given: bool, is_to_lock: bool) -> Select[float, Worker]:
    found = select(clock_column(is_given=is_clock_given).label("now"), Worker)
    found = found.where(Worker.id == bindparam("worker_id")).execution_options(populate_existing=True)
    return found.with_for_update() if is_to_lock else found


@cache
def _waiting() -> Select[Job, int | None]:
    """Select and lock the claimable jobs among `ids` in a fixed order, each with its project's limit of concurrent
    jobs."""
    waits = (Job.state == JobState.QUEUED, Job.is_held.is_(False), candidates.is_due(Job, bindparam("now")))
    found = select(Job, Project.max_concurrent_jobs).join(Project, Project.id == Job.project_id)
    named = Job.id.in_(bindparam("ids", expanding=True))
    locked = found.where(named, *waits).order_by(Job.id).with_for_update(of=Job)
    return locked.execution_options(populate_existing=True)
