"""Decides what follows a failed attempt: back-off, a base model that can't be loaded, and saving memory.

- `backoff_seconds`: other jobs run before a job whose attempt failed, which distinguishes bad nodes from bad jobs.
- `is_at_fault`: whether a base model can't be loaded anywhere, or only on this worker.
- `memory_rung`: after out of memory, the next attempt uses smaller ticks, then runs alone with one slice per tick.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from catalog.db.database import Database
from catalog.lifecycle import candidates
from catalog.lifecycle.candidates import CandidateFilter
from catalog.resources import requirements, sharding
from catalog.resources.memory import readable
from catalog.resources.sharding import reported_group
from catalog.spec.job import Quantization
from catalog.states import MAX_COUNTED_ATTEMPTS, EndReason, reasons
from catalog.tables.fleet import Trainer, Worker, is_live
from catalog.tables.history import Attempt
from catalog.tables.jobs import Job
from catalog.tables.table import Json

MAX_BACKOFF_SECONDS = 600.0


def backoff_seconds(session: Session, job: Job, *, now: float) -> float:
    """Return twice the duration of the attempt, so that a trainer with another job can start and end meanwhile.

    Returns 0 if no other job could be tried: one that has no more counted attempts, is due by then and fits the worker.
    """
    wait = min(MAX_BACKOFF_SECONDS, 2 * (now - (job.claimed_at or now)))
    worker = session.get(Worker, job.worker_id) if job.worker_id is not None else None
    if worker is None:
        return 0.0
    missing = tuple(name for name in get_args(Quantization) if name not in worker.quantizations)
    others = candidates.waiting(
        session,
        CandidateFilter(alone=True, recomputes=worker.has_gpu, without_quantizations=missing, tried_less=True),
        now=now + wait,
        per_group=1,
        num_bytes=worker.memory_bytes,
        group=reported_group(worker.devices, worker.memory_bytes),
        num_ends=job.counted_attempts,
    )
    return wait if others else 0.0


LOOKED_AT = 10
"""Number of latest trainers of a pack key that are checked."""
ENOUGH = 2
"""Number of hosts that must fail to load a base model, while none loads it, before the base model is at fault. Also the
number of workers of one host after which its other workers are not tried, because they share the host's files."""
OF_A_LOAD = reasons(lambda ending: ending.may_be_bases)
"""End reasons that the base model can cause if the trainer was never ready."""


def was_ready(report: Json | None) -> bool:
    """Whether a trainer with this report was ready: it reports its memory once it has loaded its base model."""
    return "memory" in (report or {})


def is_of_a_load(session: Session, job: Job) -> bool:
    """Whether the job's trainer is known and was never ready."""
    trainer = _trainer(session, job)
    return trainer is not None and not was_ready(trainer.report)


def is_base_suspect(session: Session, pack_key: str, worker_id: str, *, now: float) -> bool:
    """Whether the base model is at fault for failed loads, and not this worker.

    It is if other workers have failed too, or if no worker can load it and this worker's last trainer of another base
    model was ready.
    """
    found = _failures(session, pack_key)
    if found is None:
        return False
    return len(found.worker_ids) >= ENOUGH or (
        _fails(session, found, now=now) and _loads_others(session, pack_key, worker_id)
    )


def has_been_loaded(session: Session, pack_key: str) -> bool:
    """Whether one of the latest trainers has loaded the base model."""
    return any(was_ready(trainer.report) for trainer in _latest(session, pack_key))


def is_at_fault(session: Session, job: Job, reason: EndReason, *, now: float) -> bool:
    """Whether the job's base model, and not the node, is at fault for the end of a trainer that was never ready.

    It is if it fails on enough hosts, or if no worker is left that could try to load it.
    """
    trainer = _trainer(session, job)
    if reason not in OF_A_LOAD or trainer is None or was_ready(trainer.report):
        return False
    found = _failures(session, trainer.pack_key)
    return found is not None and _fails(session, found, now=now)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Failures:
    """The failed loads of a base model that none of its latest trainers has loaded."""

    worker_ids: set[str]
    hosts: Counter[str]
    """Number of these workers on each host."""
    job: Job
    """One of the jobs whose attempts failed."""


def _fails(session: Session, found: _Failures, *, now: float) -> bool:
    """Whether probably no worker can load it: enough hosts have failed, or no other worker is left that could try."""
    return len(found.hosts) >= ENOUGH or not any(
        _could_try(session, worker, found) for worker in session.scalars(select(Worker).where(is_live(now=now)))
    )


def _could_try(session: Session, worker: Worker, found: _Failures) -> bool:
    if worker.id in found.worker_ids or worker.takes_nothing_new or found.hosts[worker.host] >= ENOUGH:
        return False
    group = sharding.reported_group(worker.devices, worker.memory_bytes)
    demand = requirements.demand(found.job, recomputes=group.kind == "cuda")
    return group.needed_bytes(demand) <= group.bytes_of_each


def _loads_others(session: Session, pack_key: str, worker_id: str) -> bool:
    others = select(Trainer).where(Trainer.worker_id == worker_id, Trainer.pack_key != pack_key)
    last = session.scalars(others.order_by(Trainer.started_at.desc()).limit(1)).first()
    return last is not None and was_ready(last.report)


def _trainer(session: Session, job: Job) -> Trainer | None:
    return session.get(Trainer, job.trainer_id) if job.trainer_id is not None else None


def _latest(session: Session, pack_key: str) -> Sequence[Trainer]:
    same_key = select(Trainer).where(Trainer.pack_key == pack_key)
    return session.scalars(same_key.order_by(Trainer.started_at.desc()).limit(LOOKED_AT)).all()


def _failures(session: Session, pack_key: str) -> _Failures | None:
    """The failed loads by trainers of this key. None if any of the latest trainers was ready, or no load failed."""
    latest = _latest(session, pack_key)
    if any(was_ready(trainer.report) for trainer in latest):
        return None
    ended = (Attempt.trainer_id.in_([trainer.id for trainer in latest]), Attempt.reason.in_(OF_A_LOAD))
    # In a gang, the worker at fault may differ from the one that claimed the job.
    at_fault = func.coalesce(func.nullif(Attempt.blamed_worker_id, ""), Attempt.worker_id)
    worker_ids = set(session.scalars(select(at_fault).where(*ended).distinct()))
    job = session.scalars(select(Job).join(Attempt, Attempt.job_id == Job.id).where(*ended).limit(1)).first()
    if job is None:
        return None
    hosts = Counter(session.scalars(select(Worker.host).where(Worker.id.in_(worker_ids))))
    return _Failures(worker_ids=worker_ids, hosts=hosts, job=job)


OF_MEMORY = reasons(lambda ending: ending.is_of_memory)
"""End reasons that mean out of memory."""
MAX_OUT_OF_MEMORY = 3
"""Out-of-memory attempts before a job may fail. The last of them runs alone with one slice per tick."""
ALONE = MAX_COUNTED_ATTEMPTS - 1
"""Number of counted attempts from which on a job trains alone."""
SMALLER = "The next attempt uses smaller batches to save memory."
SMALLEST = "To save memory, the next attempt trains without other jobs and computes one micro-batch at a time."


def num_out_of_memory(session: Session, job_id: str) -> int:
    """Return the number of all attempts of the job that ran out of memory.

    Attempts whose trainer was still loading the base model are not counted, because smaller ticks would not help there.
    """
    of_memory = (Attempt.job_id == job_id, Attempt.reason.in_(OF_MEMORY))
    ended = session.scalar(select(func.count()).select_from(Attempt).where(*of_memory)) or 0
    trainers = session.scalars(select(Trainer).join(Attempt, Attempt.trainer_id == Trainer.id).where(*of_memory))
    return ended - sum(not was_ready(trainer.report) for trainer in trainers)


def num_out_of_memory_at_end(session: Session, job: Job, reason: EndReason) -> int:
    """Return `num_out_of_memory` including the attempt that ends now, or 0 if this attempt is not one of them."""
    if reason not in OF_MEMORY or is_of_a_load(session, job):
        return 0
    return num_out_of_memory(session, job.id)


def memory_rung(db: Database, job: Job) -> int:
    """Return the memory-saving level for the job's trainer: 0 normal ticks, 1 smaller ticks, 2 one slice per tick."""
    with db.read() as session:
        return _memory_rung(num_out_of_memory(session, job.id), counted_attempts=job.counted_attempts)


def _memory_rung(shortages: int, *, counted_attempts: int) -> int:
    """Smaller ticks are permanent. One slice per tick lasts until the next checkpoint, while the job trains alone."""
    return min(shortages, max(1, min(ALONE, counted_attempts)))


def next_attempt_text(shortages: int, *, counted_attempts: int) -> str:
    """Explain to users how the next attempt of a retried job saves memory."""
    return SMALLEST if _memory_rung(shortages, counted_attempts=counted_attempts) == ALONE else SMALLER


def out_of_memory_text(session: Session, job: Job) -> str:
    """Explain what was tried, and which devices would fit the job.

    The job did not fit its last device, so it needs more than that, even if its estimate is lower.
    """
    tried = "The last attempt trained without other jobs and computed one micro-batch at a time."
    worker = session.get(Worker, job.worker_id) if job.worker_id else None
    if worker is None:
        return tried
    group = sharding.reported_group(worker.devices, worker.memory_bytes)
    demand = requirements.demand(job, recomputes=group.kind == "cuda")
    estimated, available = group.needed_bytes(demand), group.bytes_of_each
    beyond = replace(demand, whole_bytes=demand.whole_bytes + max(0, available - estimated) + 1)
    fits = sharding.would_fit_sentence(sharding.would_fit(beyond))
    smallest = "the device" if group.num_devices == 1 else f"the smallest of {group.num_devices} devices"
    comparison = f"The job was estimated to need about {readable(estimated)}, and {smallest} has {readable(available)}"
    return f"{tried} {comparison}, shared with other processes. {fits}"
