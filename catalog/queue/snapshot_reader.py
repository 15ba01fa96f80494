"""Reads the `QueueSnapshot` of a worker from the database, without locks. claiming.py decides from it and claims jobs.

The number of rows read does not grow with the queue: candidates.py finds the first jobs of each project and priority
class by an index.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import get_args

from sqlalchemy import select
from sqlalchemy.orm import Session

from catalog.lifecycle import candidates
from catalog.lifecycle.candidates import CandidateFilter
from catalog.queue import charging
from catalog.resources.sharding import ShardingStrategy
from catalog.scheduling.packing import spare_bytes
from catalog.scheduling.scheduler import decide
from catalog.scheduling.snapshot import Candidate, Capacity, Policy, QueueSnapshot
from catalog.spec.job import Quantization
from catalog.states import is_suspect
from catalog.tables.fleet import Worker
from catalog.tables.history import Attempt
from catalog.tables.jobs import Job


def snapshot_of(
    session: Session,
    worker: Worker | None,
    *,
    trainer_id: str,
    capacity: Capacity,
    live_key: str | None,
    now: float,
    policy: Policy,
) -> QueueSnapshot:
    """The input of `decide` for a worker with this capacity.

    live_key: the pack key of the jobs in its trainer `trainer_id`, or None if no job trains there yet.
    """
    worker_bytes = worker.memory_bytes if worker else capacity.memory_bytes_free
    if capacity.memory_bytes_when_empty is not None:
        worker_bytes = min(worker_bytes, capacity.memory_bytes_when_empty)
    shares = charging.shares_of_waiting(session, now=now, policy=policy)
    snapshot = QueueSnapshot(
        now=now,
        candidates=(),
        shares=shares,
        served=charging.served(session, now=now),
        capacity=capacity,
        live_key=live_key,
        worker_bytes=worker_bytes,
        has_suspect=live_key is not None and _has_suspect(session, trainer_id),
    )
    if snapshot.has_suspect:
        return snapshot  # the decision is to wait, whatever the queue contains
    can_load = worker.quantizations if worker is not None else frozenset({"none"})
    snapshot = _with_candidates(snapshot, _first_jobs(session, snapshot, can_load))
    loaded_key = live_key or capacity.resident_key
    if loaded_key is not None:
        found = _jobs_of_key(session, snapshot, loaded_key, capacity.memory_bytes_free, holding=capacity.holding)
        snapshot = _with_candidates(snapshot, found)
    return _with_packmates(session, snapshot, policy)


def _with_packmates(session: Session, snapshot: QueueSnapshot, policy: Policy) -> QueueSnapshot:
    """Return the snapshot with packmates for the anchor that `decide` chooses from it.

    Each iteration reads the first jobs that fit into the memory that the chosen jobs leave, until it finds no new one.
    A larger job that is ahead of them in the queue therefore does not hide them.
    """
    for _ in range(snapshot.capacity.max_jobs if snapshot.capacity.max_jobs > 1 else 0):
        choices = decide(snapshot, policy).action.choices
        if not choices or len(choices) >= snapshot.capacity.max_jobs or choices[0].entry.candidate.is_suspect:
            break
        anchor = choices[0].entry.candidate
        holding = snapshot.capacity.holding if snapshot.live_key is not None else snapshot.capacity.holding_for(anchor)
        spare = spare_bytes(choices, snapshot.capacity)
        found = _jobs_of_key(session, snapshot, anchor.pack_key, spare, is_packmate=True, holding=holding)
        known = {candidate.job_id for candidate in snapshot.candidates}
        if all(candidate.job_id in known for candidate in found):
            break
        snapshot = _with_candidates(snapshot, found)
    return snapshot


def _with_candidates(snapshot: QueueSnapshot, found: list[Candidate]) -> QueueSnapshot:
    return replace(snapshot, candidates=(*snapshot.candidates, *found))


def _first_jobs(session: Session, snapshot: QueueSnapshot, can_load: Collection[str]) -> list[Candidate]:
    """The first jobs of each project and class that the worker can train alone, of any pack key.

    A live trainer needs as many as can be ahead of a joiner. A new trainer also needs the first jobs that fit into the
    free memory: the others only determine the order.
    """
    capacity, is_live = snapshot.capacity, snapshot.live_key is not None
    missing = tuple(name for name in get_args(Quantization) if name not in can_load)
    wanted = CandidateFilter(alone=True, recomputes=capacity.recomputes, without_quantizations=missing)

    def read(per_group: int, num_bytes: int) -> list[Candidate]:
        return candidates.waiting(
            session, wanted, now=snapshot.now, per_group=per_group, num_bytes=num_bytes, group=capacity.group
        )

    if is_live:
        return read(capacity.max_jobs + 1, snapshot.worker_bytes)
    found = read(1, max(snapshot.worker_bytes, capacity.memory_bytes_free))
    if all(capacity.alone(candidate) <= capacity.memory_bytes_free for candidate in found):
        return found
    return [*found, *read(1, capacity.memory_bytes_free)]


def _jobs_of_key(
    session: Session,
    snapshot: QueueSnapshot,
    key: str,
    num_bytes: int,
    *,
    holding: ShardingStrategy,
    is_packmate: bool = False,
) -> list[Candidate]:
    """The first jobs of each project and class that have this pack key and fit into `num_bytes`.

    Returns as many as the trainer can take, as packmates of other jobs or as its first jobs. holding: how the trainer
    holds the base model.
    """
    capacity = snapshot.capacity
    is_alone = snapshot.live_key is None and not is_packmate
    wanted = CandidateFilter(alike=True, alone=is_alone, recomputes=capacity.recomputes, holding=holding)
    return candidates.waiting(
        session,
        wanted,
        now=snapshot.now,
        key=key,
        per_group=capacity.max_jobs,
        num_bytes=num_bytes,
        group=capacity.group,
    )


def _has_suspect(session: Session, trainer_id: str) -> bool:
    live = select(Attempt.job_id).where(Attempt.trainer_id == trainer_id, Attempt.ended_at.is_(None))
    ends = select(Job.counted_attempts, Job.lost_attempts).where(Job.id.in_(session.scalars(live).all()))
    return any(is_suspect(counted, lost) for counted, lost in session.execute(ends))
