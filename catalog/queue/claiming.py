"""Claims queued jobs for a worker. `claim_pack` has five steps, which its comments number:

1. End expired leases (recovery.py).
2. Read a snapshot of the queue in one read transaction, without locks (snapshot_reader.py).
3. Decide (scheduler.py).
4. Lock the chosen jobs in a fixed order. If another worker was faster, fall back to the next job in
   `Decision.claim_order`.
5. Write claim id, lease and attempt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from sqlalchemy import Row, Select, bindparam, literal, select
from sqlalchemy.orm import Session

from catalog import failpoints
from catalog.db import lease
from catalog.db.database import Database, clock_column, clock_given, find_in, read_clock, serialize, skip_locked
from catalog.lifecycle import candidates, recovery
from catalog.lifecycle.recording import resumable
from catalog.lifecycle.transitions import move
from catalog.queue import charging
from catalog.queue.snapshot_reader import snapshot_of, with_packmates
from catalog.scheduling.packing import Choice
from catalog.scheduling.scheduler import MAX_FALLBACKS, Decision, Wait, decide, snapshot_without
from catalog.scheduling.snapshot import USUAL, Capacity, Policy, QueueSnapshot
from catalog.states import JobState, Verb
from catalog.tables.fleet import Worker
from catalog.tables.history import Attempt, Checkpoint
from catalog.tables.jobs import Job
from catalog.tables.tenancy import Project
from catalog.usage import ledger, quotas

MAX_RACES = 3
"""Maximum number of lock-free decisions per call, while other workers claim the chosen jobs first."""
MAX_TRIES = 5
"""Maximum number of further decisions, under the exclusive lock, while users cancel or pause the chosen jobs."""
CLAIM_LOCK = "take jobs off the queue"
"""Name of an advisory lock of PostgreSQL. Workers that claim jobs chosen earlier hold it in shared mode. A worker that
decides and claims in one transaction holds it exclusively."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Selection:
    """A decision and its snapshot. A worker that may not claim jobs has no snapshot."""

    decision: Decision
    snapshot: QueueSnapshot | None = None

    @property
    def choices(self) -> Sequence[Choice]:
        return self.decision.action.choices


_Rows = dict[str, tuple[Job, bool]]
"""Locked jobs by id, and whether the project limits its number of concurrent jobs."""
CLOSED = _Selection(decision=Decision(action=Wait(reason="the worker is cordoned or draining"), trace={}))


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
    for race in range(MAX_RACES):
        with db.snapshot() as session:  # most calls find no job, and reading blocks no writer
            chosen = _choose(session, request)  # 2. and 3.
        if not chosen.choices:
            return []
        failpoints.pass_by("before_claim")
        if pack_key is not None and race == 0:
            charging.settle(db, trainer_id, policy=policy)
        with db.write() as session:
            serialize(session, CLAIM_LOCK, shared=True)
            if claims := _claim(session, chosen, request):  # 4. and 5.
                return claims
    for _ in range(MAX_TRIES):  # other workers were faster; under the exclusive lock only users can interfere
        with db.write() as session:
            serialize(session, CLAIM_LOCK)
            chosen = _choose(session, request)
            claims = _claim(session, chosen, request, is_alone=True)
        if claims or not chosen.choices:
            return claims
    return []


def _choose(session: Session, request: _ClaimRequest) -> _Selection:
    now, worker = _worker(session, request.worker_id)
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
    return _Selection(decision=decide(snapshot, request.policy), snapshot=snapshot)


def _claim(session: Session, chosen: _Selection, request: _ClaimRequest, *, is_alone: bool = False) -> list[Claim]:
    """Lock the chosen jobs, skip those that were claimed or stopped in the meantime, and claim the rest.

    A pack without its anchor is not claimed: the caller then decides again. Locks the worker's row first, so a worker
    that was cordoned or drained since the decision claims no job. is_alone: no other worker claims concurrently, so
    this waits for locked rows instead of skipping them.
    """
    now, worker = _worker(session, request.worker_id, is_to_lock=True)
    if chosen.snapshot is None or not chosen.choices or (worker is not None and worker.takes_nothing_new):
        return []
    if is_alone:
        decision, rows = chosen.decision, _lock_all(session, chosen, now)
    else:
        decision, rows = _lock_first_left(session, chosen.decision, chosen.snapshot, request.policy, now)
    choices = {choice.entry.candidate.job_id: choice for choice in decision.action.choices}
    jobs = _within_limits(session, {job_id: rows[job_id] for job_id in choices if job_id in rows})
    if not jobs or (request.live_key is None and decision.claim_order[0] not in jobs):
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


def _lock_first_left(
    session: Session, decision: Decision, snapshot: QueueSnapshot, policy: Policy, now: float
) -> tuple[Decision, _Rows]:
    """Return the decision without the jobs that other workers have claimed, and its locked jobs.

    Locks the first job of `decision.claim_order` that no other transaction has locked. Workers that decide at the same
    time therefore get different anchors without waiting. Packmates are then chosen again for that anchor.
    """
    ids = decision.claim_order
    padded = [*ids, *ids[-1:] * (MAX_FALLBACKS - len(ids))]  # a fixed length keeps the statement cacheable
    given = {"ids": padded, "claim_order": f",{','.join(ids)},", "now": now}
    first = session.execute(_first_unlocked(), given).first()
    if first is None:
        return decision, {}
    passed = ids[: ids.index(first.Job.id)]
    snapshot = snapshot_without(snapshot, passed) if passed else snapshot
    found = {first.Job.id: _row(first)}
    for _ in range(MAX_RACES):  # other workers may claim packmates while this one locks them
        if snapshot.taken:
            decision = decide(with_packmates(session, snapshot, policy), policy)
            if decision.claim_order[:1] != (first.Job.id,):
                return decision, {}
        packmates = [job_id for job_id in _ids(decision.action.choices) if job_id not in found]
        if packmates:
            rows = session.execute(skip_locked(_waiting(), of=Job), {"ids": packmates, "now": now})
            found |= {row.Job.id: _row(row) for row in rows}
        gone = [job_id for job_id in packmates if job_id not in found]
        if not gone:
            break
        snapshot = replace(snapshot, taken=(*snapshot.taken, *gone))
    return decision, found


def _lock_all(session: Session, chosen: _Selection, now: float) -> _Rows:
    given = {"ids": _ids(chosen.choices), "now": now}
    rows = session.execute(_waiting().order_by(Job.id).with_for_update(of=Job), given)
    return {row.Job.id: _row(row) for row in rows}


def _ids(choices: Sequence[Choice]) -> list[str]:
    return [choice.entry.candidate.job_id for choice in choices]


def _row(row: Row[Job, int | None]) -> tuple[Job, bool]:
    return row[0], row[1] is not None


def _within_limits(session: Session, found: _Rows) -> dict[str, Job]:
    jobs = {job_id: job for job_id, (job, _) in found.items()}
    if not any(is_limited for _, is_limited in found.values()):
        return jobs
    startable = quotas.startable(session, jobs)
    return {job_id: job for job_id, job in jobs.items() if job_id in startable}


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
    """The claimable jobs among `ids`, each with its project's limit of concurrent jobs."""
    waits = (Job.state == JobState.QUEUED, Job.is_held.is_(False), candidates.is_due(Job, bindparam("now")))
    found = select(Job, Project.max_concurrent_jobs).join(Project, Project.id == Job.project_id)
    named = Job.id.in_(bindparam("ids", expanding=True))
    return found.where(named, *waits).execution_options(populate_existing=True)


@cache
def _first_unlocked() -> Select[Job, int | None]:
    """Locks the first claimable job in `claim_order` that no other transaction has locked."""
    place = find_in(bindparam("claim_order"), literal(",") + Job.id + literal(","))
    return skip_locked(_waiting().order_by(place).limit(1), of=Job)
