"""Preempts running jobs for urgent jobs, by the rules of catalog/scheduling/preemption.py.

While no urgent job waits, a check costs one query. The next heartbeat of its worker notifies a preempted job's trainer,
which saves a checkpoint at the end of a tick. The job then returns to its position in the queue.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from sqlalchemy import and_, select, union
from sqlalchemy.orm import Session

from catalog.db.database import Database, read_clock, serialize
from catalog.fleet import views
from catalog.history import events
from catalog.lifecycle import candidates
from catalog.queue import charging
from catalog.scheduling import preemption
from catalog.scheduling.ordering import QueueEntry, order
from catalog.scheduling.preemption import AT_ONCE, Holder, Preemption, Training
from catalog.scheduling.snapshot import Candidate, Policy, Share, WorkerService
from catalog.states import JobState, PriorityClass, is_suspect
from catalog.tables.fleet import Trainer, Worker, is_live
from catalog.tables.history import Attempt
from catalog.tables.jobs import Job
from catalog.usage import quotas

URGENT = PriorityClass.urgent
ASKING = "ask jobs to leave"
IS_REQUESTED = and_(Job.state == JobState.RUNNING, Job.preempted_for.is_not(None))
"""Condition for jobs whose preemption was requested and that are still running."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreemptionRequest:
    """An urgent job, and the preemption that frees memory for it."""

    job: Candidate
    preemption: Preemption


def request_preemptions(db: Database, *, policy: Policy) -> int:
    """Request the preemptions that urgent jobs need, and revoke those that are no longer needed.

    Returns the number of jobs whose preemption was requested now.
    """
    if not policy.max_preemptions:
        return 0
    with db.read() as session:  # most checks find no work, and a read transaction blocks no writer
        now = read_clock(session)
        if not _decide(session, now=now, policy=policy) and not list(
            session.scalars(select(Job.id).where(IS_REQUESTED))
        ):
            return 0
    with db.write() as session:
        serialize(session, ASKING)
        _revoke(session, now=read_clock(session))
    with db.write() as session:  # one transaction for both steps would lock jobs twice, in different orders
        serialize(session, ASKING)
        now = read_clock(session)
        decided = _decide(session, now=now, policy=policy)
        return _request(session, decided, now=now, policy=policy)


def _urgent_entries(session: Session, *, now: float, policy: Policy) -> list[tuple[QueueEntry, list[Candidate]]]:
    """The jobs that `preemption.pressing` finds in the queue, limited to those that their projects may start.

    Each comes with the jobs of other projects that are ahead of it.
    """
    urgent = candidates.waiting(session, candidates.CandidateFilter(priority=URGENT), now=now, per_group=AT_ONCE)
    late = [job for job in urgent if now - job.queued_at >= policy.preempt_after_seconds]
    if all(policy.awaits_preemption(job.preemption_requested_at, now) for job in late):
        return []
    waiting = candidates.waiting(session, candidates.CandidateFilter(), now=now, per_group=AT_ONCE)
    shares, served = charging.shares_of_waiting(session, now=now, policy=policy), charging.served(session, now=now)
    entries = order(waiting, now, shares=shares, served=served, policy=policy)
    return _startable(session, preemption.pressing(entries, now=now, policy=policy), late)[:AT_ONCE]


def _startable(
    session: Session, found: Sequence[tuple[QueueEntry, list[Candidate]]], late: Collection[Candidate]
) -> list[tuple[QueueEntry, list[Candidate]]]:
    """The jobs that their projects' limits allow, in addition to `late` jobs that already await a preemption."""
    found_ids = {entry.candidate.job_id for entry, _ in found}
    free = quotas.free_places(session, {entry.candidate.project_id for entry, _ in found}) if found else {}
    for job in late:
        if job.job_id not in found_ids:
            free[job.project_id] = free.get(job.project_id, math.inf) - 1
    startable: list[tuple[QueueEntry, list[Candidate]]] = []
    for entry, ahead in found:
        project_id = entry.candidate.project_id
        free[project_id] = free.get(project_id, math.inf) - 1
        startable += [(entry, ahead)] if free[project_id] >= 0 else []
    return startable


def _revoke(session: Session, *, now: float) -> None:
    """Revoke preemptions for urgent jobs that can't start: no longer queued, held, or in a project at a limit.

    A victim that has already received the directive still leaves its trainer.
    """
    named = union(select(Job.id).where(IS_REQUESTED), select(Job.preempted_for).where(IS_REQUESTED))
    locked = select(Job).where(Job.id.in_(named)).order_by(Job.id).with_for_update()
    jobs = {job.id: job for job in session.scalars(locked)}
    for job in jobs.values():
        if job.preempted_for is None or _may_start(session, job.preempted_for, now=now):
            continue
        jobs[job.preempted_for].preemption_requested_at = None
        job.preempted_for = None
        events.add(
            session, job.id, now=now, message="The preemption was revoked, because no job needs the memory any more."
        )


def _may_start(session: Session, job_id: str | None, *, now: float) -> bool:
    waits = (Job.id == job_id, Job.state == JobState.QUEUED, Job.is_held.is_(False))
    project_id = session.scalar(select(Job.project_id).where(*waits))
    return project_id is not None and not quotas.holds(session, now=now, project_ids=[project_id])


def _decide(session: Session, *, now: float, policy: Policy) -> list[PreemptionRequest]:
    entries = _urgent_entries(session, now=now, policy=policy)
    holders = _holders(session, now=now, policy=policy) if entries else []
    decided: list[PreemptionRequest] = []
    for entry, ahead in entries:
        chosen = preemption.choose(entry, holders, ahead=ahead, now=now, policy=policy)
        if chosen is None:
            continue
        decided.append(PreemptionRequest(job=entry.candidate, preemption=chosen))
        holders = [_without(holder, chosen) for holder in holders]
    return [one for one in decided if one.preemption.victims]


def _without(holder: Holder, chosen: Preemption) -> Holder:
    """The holder without the memory and jobs that `chosen` uses up: the next urgent job needs other victims."""
    if holder.worker_id != chosen.worker_id:
        return holder
    gone = {victim.job_id for victim in chosen.victims}
    remaining = tuple(job for job in holder.jobs if job.job_id not in gone and not job.is_leaving)
    return replace(holder, jobs=remaining, memory_bytes_free=0, places=0)


def _request(session: Session, decided: Sequence[PreemptionRequest], *, now: float, policy: Policy) -> int:
    named = {one.job.job_id for one in decided} | {v.job_id for one in decided for v in one.preemption.victims}
    locked = select(Job).where(Job.id.in_(named)).order_by(Job.id).with_for_update()
    jobs = {job.id: job for job in session.scalars(locked.execution_options(populate_existing=True))} if named else {}
    number = 0
    for one in decided:
        victims = [(jobs[victim.job_id], victim) for victim in one.preemption.victims]
        is_as_seen = all(job.claim_id == victim.claim_id and job.preempted_for is None for job, victim in victims)
        if not is_as_seen or jobs[one.job.job_id].state != JobState.QUEUED:
            continue
        jobs[one.job.job_id].preemption_requested_at = now
        for job, victim in victims:
            _request_one(session, job, one, victim, now=now, policy=policy)
            number += 1
        _notify_urgent_job(session, one, now=now)
    return number


def _request_one(
    session: Session, job: Job, one: PreemptionRequest, victim: Training, *, now: float, policy: Policy
) -> None:
    job.preempted_for = one.job.job_id
    data = preemption.preemption_record(one.job, one.preemption, victim, now=now, policy=policy)
    attempt = session.get(Attempt, job.claim_id)
    if attempt is not None:
        attempt.preemption = data
    message = "An urgent job preempts this job. It saves a checkpoint and returns to its position in the queue."
    events.add(session, job.id, now=now, message=message, data=data)


def _notify_urgent_job(session: Session, one: PreemptionRequest, *, now: float) -> None:
    number = len(one.preemption.victims)
    jobs = "1 lower-priority job is" if number == 1 else f"{number} lower-priority jobs are"
    data = {"worker_id": one.preemption.worker_id, "num_leaving": number, "makes": one.preemption.makes}
    events.add(session, one.job.job_id, now=now, message=f"{jobs} being preempted for this job.", data=data)


def _holders(session: Session, *, now: float, policy: Policy) -> list[Holder]:
    """Live workers that accept jobs and have running ones."""
    running = select(Job, Attempt).join(Attempt, Attempt.claim_id == Job.claim_id)
    by_worker: defaultdict[str | None, list[tuple[Job, Attempt]]] = defaultdict(list)
    for job, attempt in session.execute(running.where(Job.state == JobState.RUNNING)):
        by_worker[job.worker_id].append((job, attempt))
    live = select(Worker, Trainer.pack_key).outerjoin(Trainer, Trainer.id == Worker.trainer_id)
    rows = session.execute(live.where(is_live(now=now))).all()
    accepting = [(worker, key) for worker, key in rows if by_worker[worker.id] and not worker.takes_nothing_new]
    shares, lent = charging.shares_of_training(session, now=now, policy=policy), views.lent_devices(session)
    found: list[Holder] = []
    for worker, key in accepting:
        num_devices = views.count_devices(worker.id, worker.devices, lent)
        found.append(_holder(worker, key, by_worker[worker.id], shares=shares, num_devices=num_devices, policy=policy))
    return found


def _holder(
    worker: Worker,
    key: str | None,
    claimed: list[tuple[Job, Attempt]],
    *,
    shares: Mapping[str, Share],
    num_devices: int,
    policy: Policy,
) -> Holder:
    capacity, recomputes, can_load = views.reported_capacity(worker), worker.has_gpu, worker.quantizations
    service = WorkerService(
        at={},
        memory_bytes=worker.memory_bytes,
        recomputes=recomputes,
        group=views.empty_capacity(worker).group,
        can_load=can_load,
    )
    num_jobs = Counter(job.project_id for job, _ in claimed)

    def training(job: Job, attempt: Attempt) -> Training:
        devices_left = num_devices * num_jobs[job.project_id] / len(claimed)
        effective_priority = min(job.priority, int(attempt.why["effective_priority"]))
        share = shares.get(job.project_id, Share())
        level = preemption.level_if_it_left(share, priority=job.priority, devices_left=devices_left, policy=policy)
        own = (job.own_bytes or 0) + (job.slice_bytes or 0) - ((job.saved_bytes or 0) if recomputes else 0)
        return Training(
            job_id=job.id,
            claim_id=attempt.claim_id,
            project_id=job.project_id,
            effective_priority=effective_priority,
            effective_level=level,
            own_bytes=own,
            began_at=attempt.started_at,
            num_packmates=len(claimed),
            num_preemptions=job.num_preemptions,
            is_leaving=job.cancel_requested or job.pause_requested or job.preempted_for is not None,
            seconds_left=(job.progress or {}).get("seconds_left"),
        )

    return Holder(
        worker_id=worker.id,
        pack_key=key or claimed[0][0].pack_key,
        service=service,
        jobs=tuple(training(job, attempt) for job, attempt in claimed),
        memory_bytes_free=capacity.memory_bytes_free,
        places=capacity.max_jobs,
        holding=capacity.holding,
        has_suspect=any(is_suspect(job.counted_attempts, job.lost_attempts) for job, _ in claimed),
    )
