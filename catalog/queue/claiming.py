"""How a worker claims jobs. `claim_pack` does it in five steps:

1. End expired leases (recovery.py). 2. Read a snapshot of the queue, without locks. 3. Decide (scheduler.py). 4. Lock
the chosen jobs in a fixed order; where other workers were faster, fall back to the next in `Decision.in_turn`.
5. Write claim id, lease and attempt.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import get_args

from sqlalchemy import Row, Select, bindparam, literal, select
from sqlalchemy.orm import Session

from catalog import failpoints
from catalog.db import lease
from catalog.db.database import Database, clock_column, clock_given, find_in, read_clock, serialize, skip_locked
from catalog.fleet import views
from catalog.lifecycle import candidates, recovery
from catalog.lifecycle.candidates import CandidateFilter
from catalog.lifecycle.recording import resumable
from catalog.lifecycle.transitions import move
from catalog.queue import charging
from catalog.resources.sharding import ShardingStrategy
from catalog.scheduling.packing import Choice, spare_bytes
from catalog.scheduling.scheduler import MAX_FALLBACKS, Decision, Wait, decide, snapshot_without
from catalog.scheduling.snapshot import USUAL, Candidate, Capacity, Policy, QueueSnapshot
from catalog.spec.job import Quantization
from catalog.states import JobState, Verb, is_suspect
from catalog.tables.fleet import Worker
from catalog.tables.history import Attempt, Checkpoint
from catalog.tables.jobs import Job
from catalog.tables.tenancy import Project
from catalog.usage import ledger, quotas

MAX_RACES = 3
"""Looks at the queue in one call while others take what was chosen."""
MAX_TRIES = 5
"""Looks after those by a worker that chooses alone, where people cancel or pause what was chosen."""
TAKING = "take jobs off the queue"
"""Shared by workers that take what they have chosen; by one alone that chooses and takes in one transaction."""

AS = {
    "anchor": "in a trainer that starts for it",
    "packmate": "with the job that a trainer starts for",
    "joiner": "in a trainer that runs already",
}
"""By the role that the decision gave it, for people."""
IS_LOADED = "in the trainer that has its base loaded"
"""Of an anchor, where there is such a trainer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A job that is this worker's now."""

    job: Job
    claim_id: str
    attempt: int
    waited_since: float
    """When it came into the queue."""
    resume_candidates: tuple[Checkpoint, ...]
    """Checkpoints to go on from, newest first: the second is for when the first is damaged."""

    @property
    def resume_from(self) -> Checkpoint | None:
        return self.resume_candidates[0] if self.resume_candidates else None


@dataclass(frozen=True, kw_only=True, slots=True)
class _ClaimRequest:
    """What a worker asks for."""

    worker_id: str
    trainer_id: str
    room: Capacity
    live_key: str | None
    lease_seconds: float
    policy: Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class _Selection:
    """What was decided, and from what."""

    decision: Decision
    snapshot: QueueSnapshot | None = None
    """None: nothing was looked at."""

    @property
    def choices(self) -> Sequence[Choice]:
        return self.decision.action.choices


_Rows = dict[str, tuple[Job, bool]]
"""Jobs that are locked, by id, and whether their projects may train only so many."""
CLOSED = _Selection(decision=Decision(action=Wait(reason="the worker is cordoned or to leave"), trace={}))


def claim_pack(
    db: Database,
    *,
    worker_id: str,
    trainer_id: str,
    room: Capacity,
    lease_seconds: float,
    pack_key: str | None = None,
    policy: Policy = USUAL,
) -> list[Claim]:
    """Claim jobs to train, the first in the queue first. Returns [] if none fits.

    pack_key None: for a new trainer, an anchor and its packmates. Else: jobs that join the live trainer
    `trainer_id` of that key.
    """
    recovery.expire(db, grace_seconds=lease_seconds)
    request = _ClaimRequest(
        worker_id=worker_id,
        trainer_id=trainer_id,
        room=room,
        live_key=pack_key,
        lease_seconds=lease_seconds,
        policy=policy,
    )
    for race in range(MAX_RACES):
        with db.read() as session:  # most looks find nothing, and keep nobody from writing
            chosen = _choose(session, request)
        if not chosen.choices:
            return []
        failpoints.pass_by("before_claim")
        if pack_key is not None and race == 0:
            charging.settle(db, trainer_id, policy=policy)
        with db.write() as session:
            serialize(session, TAKING, shared=True)
            if claims := _take(session, chosen, request):
                return claims
    for _ in range(MAX_TRIES):  # other workers were faster; with the exclusive lock only users can interfere
        with db.write() as session:
            serialize(session, TAKING)
            chosen = _choose(session, request)
            claims = _take(session, chosen, request, is_alone=True)
        if claims or not chosen.choices:
            return claims
    return []


def _choose(session: Session, request: _ClaimRequest) -> _Selection:
    now, worker = _worker(session, request.worker_id)
    if worker is not None and worker.takes_nothing_new:
        return CLOSED
    snapshot = snapshot_of_worker(
        session,
        worker,
        trainer_id=request.trainer_id,
        room=request.room,
        live_key=request.live_key,
        now=now,
        policy=request.policy,
    )
    return _Selection(decision=decide(snapshot, request.policy), snapshot=snapshot)


def _take(session: Session, chosen: _Selection, request: _ClaimRequest, *, is_alone: bool = False) -> list[Claim]:
    """Lock the chosen jobs, skip those that were claimed or stopped in the meantime, and claim the rest.

    Without its anchor a pack is not claimed; the caller chooses again. The worker's row is locked, and a worker that
    was cordoned or drained since the choice claims nothing. is_alone: no other worker claims at the same time, so this
    waits for locked rows instead of skipping them.
    """
    now, worker = _worker(session, request.worker_id, is_to_lock=True)
    if chosen.snapshot is None or not chosen.choices or (worker is not None and worker.takes_nothing_new):
        return []
    if is_alone:
        decision, found = chosen.decision, _all_chosen(session, chosen, now)
    else:
        decision, found = _first_left(session, chosen.decision, chosen.snapshot, request.policy, now)
    choices = {choice.turn.candidate.job_id: choice for choice in decision.action.choices}
    jobs = _beginnable(session, {job_id: found[job_id] for job_id in choices if job_id in found})
    if not jobs or (request.live_key is None and decision.in_turn[0] not in jobs):
        return []
    since = {job_id: job.queued_at or job.created_at for job_id, job in jobs.items()}
    for job_id in sorted(jobs):
        _begin(session, jobs[job_id], decision, choices[job_id], request, now=now)
    turns = [(job.project_id, job.priority) for job_id, job in jobs.items() if choices[job_id].turn.is_first_of_class]
    if worker is not None and turns:
        charging.note_turns(worker, turns, now=now, policy=request.policy)
    return [_claim(session, job, waited_since=since[job_id]) for job_id, job in jobs.items()]


def _first_left(
    session: Session, decision: Decision, snapshot: QueueSnapshot, policy: Policy, now: float
) -> tuple[Decision, _Rows]:
    """The decision without the jobs that other workers have claimed, and its locked jobs.

    The statement locks the first unlocked job of `decision.in_turn`. So of many workers that decide at the same time
    each gets another anchor, and none waits. Packmates are chosen again for that anchor.
    """
    ids = decision.in_turn
    padded = [*ids, *ids[-1:] * (MAX_FALLBACKS - len(ids))]  # so that the statement is always the same
    given = {"ids": padded, "in_turn": f",{','.join(ids)},", "now": now}
    first = session.execute(_first_of(), given).first()
    if first is None:
        return decision, {}
    passed = ids[: ids.index(first.Job.id)]
    snapshot = snapshot_without(snapshot, passed) if passed else snapshot
    found = {first.Job.id: _row(first)}
    for _ in range(MAX_RACES):
        if snapshot.taken:
            decision = decide(snapshot_with_mates(session, snapshot, policy), policy)
            if decision.in_turn[:1] != (first.Job.id,):
                return decision, {}
        beside = [job_id for job_id in _ids(decision.action.choices) if job_id not in found]
        if beside:
            rows = session.execute(skip_locked(_waiting(), of=Job), {"ids": beside, "now": now})
            found |= {row.Job.id: _row(row) for row in rows}
        gone = [job_id for job_id in beside if job_id not in found]
        if not gone:
            break
        snapshot = replace(snapshot, taken=(*snapshot.taken, *gone))
    return decision, found


def _all_chosen(session: Session, chosen: _Selection, now: float) -> _Rows:
    given = {"ids": _ids(chosen.choices), "now": now}
    rows = session.execute(_waiting().order_by(Job.id).with_for_update(of=Job), given)
    return {row.Job.id: _row(row) for row in rows}


def _ids(choices: Sequence[Choice]) -> list[str]:
    return [choice.turn.candidate.job_id for choice in choices]


def _row(row: Row[Job, int | None]) -> tuple[Job, bool]:
    return row[0], row[1] is not None


def _beginnable(session: Session, found: _Rows) -> dict[str, Job]:
    jobs = {job_id: job for job_id, (job, _) in found.items()}
    if not any(is_limited for _, is_limited in found.values()):
        return jobs
    may_begin = quotas.beginnable(session, jobs)
    return {job_id: job for job_id, job in jobs.items() if job_id in may_begin}


def _begin(
    session: Session, job: Job, decision: Decision, choice: Choice, request: _ClaimRequest, *, now: float
) -> None:
    claim_id = lease.acquire(job, now=now, lease_seconds=request.lease_seconds)
    job.attempt += 1
    job.claimed_at = job.charged_at = now
    job.worker_id, job.trainer_id = request.worker_id, request.trainer_id
    job.lease_extended, job.run_after = False, None
    attempt = Attempt(claim_id=claim_id, job_id=job.id, number=job.attempt, worker_id=job.worker_id)
    attempt.trainer_id, attempt.started_at, attempt.why = job.trainer_id, now, decision.why(choice)
    session.add(attempt)
    ledger.count(session, "claims")
    is_loaded = choice.role == "anchor" and request.room.resident_key == choice.turn.candidate.pack_key
    message = f"Attempt {job.attempt} begins on worker {job.worker_id}, {IS_LOADED if is_loaded else AS[choice.role]}"
    move(session, job, Verb.CLAIM, now=now, message=message)


def _claim(session: Session, job: Job, *, waited_since: float) -> Claim:
    assert job.claim_id is not None
    checkpoints = resumable(session, job.id) if job.attempt > 1 else ()  # before its first attempt it has none
    return Claim(
        job=job,
        claim_id=job.claim_id,
        attempt=job.attempt,
        waited_since=waited_since,
        resume_candidates=checkpoints,
    )


def _worker(session: Session, worker_id: str, *, is_to_lock: bool = False) -> tuple[float, Worker | None]:
    """The time, and the worker's row."""
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
    """Those of some jobs that may be claimed, and what limits how many of their project train at once."""
    waits = (Job.state == JobState.QUEUED, Job.is_held.is_(False), candidates.is_due(Job, bindparam("now")))
    found = select(Job, Project.max_concurrent_jobs).join(Project, Project.id == Job.project_id)
    named = Job.id.in_(bindparam("ids", expanding=True))
    return found.where(named, *waits).execution_options(populate_existing=True)


@cache
def _first_of() -> Select[Job, int | None]:
    """The first of them that is not locked, which then is."""
    place = find_in(bindparam("in_turn"), literal(",") + Job.id + literal(","))
    return skip_locked(_waiting().order_by(place).limit(1), of=Job)


def snapshot_of_worker(
    session: Session,
    worker: Worker | None,
    *,
    trainer_id: str,
    room: Capacity,
    live_key: str | None,
    now: float,
    policy: Policy,
) -> QueueSnapshot:
    """For a worker that has this room: beside the jobs of its trainer `trainer_id`, whose pack key is `live_key`, or
    (None) for a trainer's first jobs."""
    whole = worker.memory_bytes if worker else room.memory_bytes_free
    waiting = charging.shares_of_waiting(session, now=now, policy=policy)
    snapshot = QueueSnapshot(
        now=now,
        candidates=(),
        shares=waiting,
        served=charging.served(session, now=now),
        room=room,
        live_key=live_key,
        worker_bytes=whole if room.memory_bytes_when_empty is None else min(whole, room.memory_bytes_when_empty),
        has_suspect=live_key is not None and _holds_suspect(session, trainer_id),
        per_group=math.ceil(MAX_FALLBACKS / max(1, len(waiting))),
    )
    if snapshot.has_suspect:
        return snapshot
    can_load = views.quantizations_of(worker) if worker is not None else frozenset({"none"})
    snapshot = _with_candidates(snapshot, _firsts(session, snapshot, can_load))
    for_whom = live_key or room.resident_key
    if for_whom is not None:
        found = _alike(session, snapshot, for_whom, room.memory_bytes_free, holding=room.holding)
        snapshot = _with_candidates(snapshot, found)
    return snapshot_with_mates(session, snapshot, policy)


def _with_candidates(snapshot: QueueSnapshot, found: list[Candidate]) -> QueueSnapshot:
    return replace(snapshot, candidates=(*snapshot.candidates, *found))


def snapshot_with_mates(session: Session, snapshot: QueueSnapshot, policy: Policy) -> QueueSnapshot:
    """And those of the anchor's kind that may be let in beside what is chosen already: the first of those that fit into
    what is left, again and again until there is none. So larger ones that wait before them hide nobody."""
    for _ in range(snapshot.room.max_jobs if snapshot.room.max_jobs > 1 else 0):
        choices = decide(snapshot, policy).action.choices
        if not choices or len(choices) >= snapshot.room.max_jobs or choices[0].turn.candidate.is_suspect:
            break
        key = choices[0].turn.candidate.pack_key
        holding = snapshot.room.holding
        if snapshot.live_key is None:
            holding = snapshot.room.holding_for(choices[0].turn.candidate)
        spare = spare_bytes(choices, snapshot.room)
        found = _alike(session, snapshot, key, spare, is_beside=True, holding=holding)
        seen = {candidate.job_id for candidate in snapshot.candidates}
        if all(candidate.job_id in seen for candidate in found):
            break
        snapshot = _with_candidates(snapshot, found)
    return snapshot


def _firsts(session: Session, snapshot: QueueSnapshot, can_load: Collection[str]) -> list[Candidate]:
    """Of each project and class those that stand first of what the worker holds, each with a trainer to itself.

    Of those that may come before one that joins, as many as can. For a new trainer also the first that fit into what is
    free: the others are there because the worker holds them, so that who goes before them takes no turn of theirs. And
    more than one decision needs, for those of which other workers take some meanwhile.
    """
    room, is_live = snapshot.room, snapshot.live_key is not None
    missing = tuple(name for name in get_args(Quantization) if name not in can_load)
    such = CandidateFilter(alone=True, recomputes=room.recomputes, not_held_as=missing)

    def look(per_group: int, num_bytes: int) -> list[Candidate]:
        return candidates.waiting(
            session, such, now=snapshot.now, per_group=per_group, num_bytes=num_bytes, group=room.group
        )

    per_group = snapshot.per_group or 1
    if is_live:
        return look(max(room.max_jobs + 1, per_group), snapshot.worker_bytes)
    found = look(per_group, max(snapshot.worker_bytes, room.memory_bytes_free))
    if all(room.alone(candidate) <= room.memory_bytes_free for candidate in found):
        return found
    return [*found, *look(per_group, room.memory_bytes_free)]


def _alike(
    session: Session,
    snapshot: QueueSnapshot,
    key: str,
    num_bytes: int,
    *,
    holding: ShardingStrategy,
    is_beside: bool = False,
) -> list[Candidate]:
    """Of each project and class as many of that pack key as there is room for, the first of those that fit: beside
    others, or by themselves. holding: how the trainer holds the base."""
    room = snapshot.room
    is_alone = snapshot.live_key is None and not is_beside
    such = CandidateFilter(alike=True, alone=is_alone, recomputes=room.recomputes, holding=holding)
    per_group = room.max_jobs + len(snapshot.taken) if is_beside else max(room.max_jobs, snapshot.per_group or 1)
    return candidates.waiting(
        session, such, now=snapshot.now, key=key, per_group=per_group, num_bytes=num_bytes, group=room.group
    )


def _holds_suspect(session: Session, trainer_id: str) -> bool:
    live = select(Attempt.job_id).where(Attempt.trainer_id == trainer_id, Attempt.ended_at.is_(None))
    held = select(Job.counted_attempts, Job.lost_attempts).where(Job.id.in_(session.scalars(live).all()))
    return any(is_suspect(counted, lost) for counted, lost in session.execute(held))
