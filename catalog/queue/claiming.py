"""How a worker that has room takes jobs off the queue: it looks, decides, and locks what it decided; a claim is a job
that is its own then.

Many workers look at once and come to one order of turns; each takes the first that is left. Read claim_pack first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from sqlalchemy import Row, Select, bindparam, literal, select
from sqlalchemy.orm import Session

from catalog import failpoints
from catalog.db.database import Database, clock_column, clock_given, find_in, read_clock, serialise, skip_locked
from catalog.lifecycle import candidates as heads
from catalog.lifecycle import recovery
from catalog.lifecycle.recording import resumable
from catalog.lifecycle.transitions import move
from catalog.queue import charging, snapshots
from catalog.scheduling.contention import MAX_TURNS, without
from catalog.scheduling.packing import Choice
from catalog.scheduling.scheduler import Decision, Nothing, decide
from catalog.scheduling.snapshot import USUAL, Picture, Policy, Room
from catalog.states import JobState, Verb
from catalog.tables import Attempt, Checkpoint, Job, Project, Worker, new_id
from catalog.usage import counters, quotas

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
class _Ask:
    """What a worker asks for."""

    worker_id: str
    trainer_id: str
    room: Room
    live_key: str | None
    lease_seconds: float
    policy: Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chosen:
    """What was decided, and from what."""

    decision: Decision
    picture: Picture | None = None
    """None: nothing was looked at."""

    @property
    def choices(self) -> Sequence[Choice]:
        return self.decision.action.choices


_Found = dict[str, tuple[Job, bool]]
"""Jobs that are locked, by id, and whether their projects may train only so many."""
CLOSED = _Chosen(decision=Decision(action=Nothing(reason="the worker is cordoned or to leave"), trace={}))


def claim_pack(
    db: Database,
    *,
    worker_id: str,
    trainer_id: str,
    room: Room,
    lease_seconds: float,
    pack_key: str | None = None,
    policy: Policy = USUAL,
) -> list[Claim]:
    """Jobs to train, best turn first; [] where none fits.

    pack_key None: for a new trainer, an anchor and its packmates. Else: jobs that join the live trainer
    `trainer_id` of that key.
    """
    recovery.expire(db, grace_seconds=lease_seconds)
    ask = _Ask(
        worker_id=worker_id,
        trainer_id=trainer_id,
        room=room,
        live_key=pack_key,
        lease_seconds=lease_seconds,
        policy=policy,
    )
    for race in range(MAX_RACES):
        with db.read() as session:  # most looks find nothing, and keep nobody from writing
            chosen = _choose(session, ask)
        if not chosen.choices:
            return []
        failpoints.pass_by("before_claim")
        if pack_key is not None and race == 0:
            charging.settle(db, trainer_id, policy=policy)
        with db.write() as session:
            serialise(session, TAKING, shared=True)
            if claims := _take(session, chosen, ask):
                return claims
    for _ in range(MAX_TRIES):  # others were quicker: from here on none is, only people may be
        with db.write() as session:
            serialise(session, TAKING)
            chosen = _choose(session, ask)
            claims = _take(session, chosen, ask, is_alone=True)
        if claims or not chosen.choices:
            return claims
    return []


def _choose(session: Session, ask: _Ask) -> _Chosen:
    now, worker = _worker(session, ask.worker_id)
    if worker is not None and worker.takes_nothing_new:
        return CLOSED
    picture = snapshots.of_worker(
        session, worker, trainer_id=ask.trainer_id, room=ask.room, live_key=ask.live_key, now=now, policy=ask.policy
    )
    return _Chosen(decision=decide(picture, ask.policy), picture=picture)


def _take(session: Session, chosen: _Chosen, ask: _Ask, *, is_alone: bool = False) -> list[Claim]:
    """Lock what was chosen, pass over what is taken or stopped since, and claim the rest.

    Without its anchor a pack is not taken: the choice is made anew. Nor by a worker that was cordoned or asked to
    drain since the choice; its row is locked, so that nobody asks before this is done. is_alone: no other worker takes
    anything meanwhile, so that whoever has a row locked is waited for.
    """
    now, worker = _worker(session, ask.worker_id, is_to_lock=True)
    if chosen.picture is None or not chosen.choices or (worker is not None and worker.takes_nothing_new):
        return []
    if is_alone:
        decision, found = chosen.decision, _all_chosen(session, chosen, now)
    else:
        decision, found = _first_left(session, chosen.decision, chosen.picture, ask.policy, now)
    choices = {choice.turn.candidate.job_id: choice for choice in decision.action.choices}
    jobs = _beginnable(session, {job_id: found[job_id] for job_id in choices if job_id in found})
    if not jobs or (ask.live_key is None and decision.in_turn[0] not in jobs):
        return []
    since = {job_id: job.queued_at or job.created_at for job_id, job in jobs.items()}
    for job_id in sorted(jobs):
        _begin(session, jobs[job_id], decision, choices[job_id], ask, now=now)
    turns = [(job.project_id, job.priority) for job_id, job in jobs.items() if choices[job_id].turn.is_first_of_class]
    if worker is not None and turns:
        charging.note_turns(worker, turns, now=now, policy=ask.policy)
    return [_claim(session, job, waited_since=since[job_id]) for job_id, job in jobs.items()]


def _first_left(
    session: Session, decision: Decision, picture: Picture, policy: Policy, now: float
) -> tuple[Decision, _Found]:
    """What is decided without those that others have taken, and its jobs, locked; none where that is another's turn.

    The first that nobody holds is locked, in the order in which they would be chosen one after the other. So of many
    workers that look at once each has another, and nobody waits. For who was to train beside it others are found.
    """
    ids = decision.in_turn
    padded = [*ids, *ids[-1:] * (MAX_TURNS - len(ids))]  # so that the statement is always the same
    given = {"ids": padded, "in_turn": f",{','.join(ids)},", "now": now}
    first = session.execute(_first_of(), given).first()
    if first is None:
        return decision, {}
    passed = ids[: ids.index(first.Job.id)]
    picture = without(picture, passed) if passed else picture
    found = {first.Job.id: _row(first)}
    for _ in range(MAX_RACES):
        if picture.taken:
            decision = decide(snapshots.with_mates(session, picture, policy), policy)
            if decision.in_turn[:1] != (first.Job.id,):
                return decision, {}
        beside = [job_id for job_id in _ids(decision.action.choices) if job_id not in found]
        if beside:
            rows = session.execute(skip_locked(_waiting(), of=Job), {"ids": beside, "now": now})
            found |= {row.Job.id: _row(row) for row in rows}
        gone = [job_id for job_id in beside if job_id not in found]
        if not gone:
            break
        picture = replace(picture, taken=(*picture.taken, *gone))
    return decision, found


def _all_chosen(session: Session, chosen: _Chosen, now: float) -> _Found:
    given = {"ids": _ids(chosen.choices), "now": now}
    rows = session.execute(_waiting().order_by(Job.id).with_for_update(of=Job), given)
    return {row.Job.id: _row(row) for row in rows}


def _ids(choices: Sequence[Choice]) -> list[str]:
    return [choice.turn.candidate.job_id for choice in choices]


def _row(row: Row[Job, int | None]) -> tuple[Job, bool]:
    return row[0], row[1] is not None


def _beginnable(session: Session, found: _Found) -> dict[str, Job]:
    jobs = {job_id: job for job_id, (job, _) in found.items()}
    if not any(is_limited for _, is_limited in found.values()):
        return jobs
    may_begin = quotas.beginnable(session, jobs)
    return {job_id: job for job_id, job in jobs.items() if job_id in may_begin}


def _begin(session: Session, job: Job, decision: Decision, choice: Choice, ask: _Ask, *, now: float) -> None:
    job.claim_id = new_id("claim")
    job.attempt += 1
    job.claimed_at = job.charged_at = now
    job.worker_id, job.trainer_id = ask.worker_id, ask.trainer_id
    job.lease_expires_at, job.lease_extended, job.run_after = now + ask.lease_seconds, False, None
    attempt = Attempt(claim_id=job.claim_id, job_id=job.id, number=job.attempt, worker_id=job.worker_id)
    attempt.trainer_id, attempt.started_at, attempt.why = job.trainer_id, now, decision.why(choice)
    session.add(attempt)
    counters.add(session, "claims")
    is_loaded = choice.role == "anchor" and ask.room.resident_key == choice.turn.candidate.pack_key
    message = f"Attempt {job.attempt} begins on worker {job.worker_id}, {IS_LOADED if is_loaded else AS[choice.role]}"
    move(session, job, Verb.CLAIM, now=now, message=message)


def _claim(session: Session, job: Job, *, waited_since: float) -> Claim:
    assert job.claim_id is not None
    candidates = resumable(session, job.id) if job.attempt > 1 else ()  # before its first attempt it has none
    return Claim(
        job=job,
        claim_id=job.claim_id,
        attempt=job.attempt,
        waited_since=waited_since,
        resume_candidates=candidates,
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
    waits = (Job.state == JobState.QUEUED, Job.is_held.is_(False), heads.is_due(Job, bindparam("now")))
    found = select(Job, Project.max_concurrent_jobs).join(Project, Project.id == Job.project_id)
    named = Job.id.in_(bindparam("ids", expanding=True))
    return found.where(named, *waits).execution_options(populate_existing=True)


@cache
def _first_of() -> Select[Job, int | None]:
    """The first of them that is not locked, which then is."""
    place = find_in(bindparam("in_turn"), literal(",") + Job.id + literal(","))
    return skip_locked(_waiting().order_by(place).limit(1), of=Job)
