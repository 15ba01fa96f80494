"""What failed attempts mean for the next one: back-off, base models that can't be loaded, and out-of-memory handling.

- `backoff_seconds`: a job whose attempt failed lets others go first, so that a bad node is told from a bad job.
- `is_to_blame`: whether a base model can't be loaded anywhere, or only on this worker.
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
from catalog.tables.fleet import Trainer, Worker, has_gpu, is_live, quantizations_on
from catalog.tables.history import Attempt
from catalog.tables.jobs import Job
from catalog.tables.storage import BaseModelRow
from catalog.tables.table import Json

MAX_BACKOFF_SECONDS = 600.0


def backoff_seconds(session: Session, job: Job, *, now: float) -> float:
    """Twice what the attempt took, for a trainer to start and end meanwhile; 0 where nothing else would be tried: no
    job that ended badly no oftener, comes due by then, and fits the worker."""
    wait = min(MAX_BACKOFF_SECONDS, 2 * (now - (job.claimed_at or now)))
    worker = session.get(Worker, job.worker_id) if job.worker_id is not None else None
    if worker is None:
        return 0.0
    missing = tuple(name for name in get_args(Quantization) if name not in quantizations_on(worker.devices))
    others = candidates.waiting(
        session,
        CandidateFilter(alone=True, recomputes=has_gpu(worker.devices), without_quantizations=missing, tried_less=True),
        now=now + wait,
        per_group=1,
        num_bytes=worker.memory_bytes,
        group=reported_group(worker.devices, worker.memory_bytes),
        num_ends=job.counted_attempts,
    )
    return wait if others else 0.0


LOOKED_AT = 10
"""Latest trainers of one pack key."""
ENOUGH = 2
"""Hosts that have failed to load a base, none having done so, before it is to blame; and workers of one host, which
share its copy of the files, before none of the others there is waited for."""
OF_A_LOAD = reasons(lambda ending: ending.may_be_bases)


def was_ready(report: Json | None) -> bool:
    """By what a trainer has said of itself: its memory, once it has loaded its base."""
    return "memory" in (report or {})


def is_of_a_load(session: Session, job: Job) -> bool:
    """Whether its trainer is known, and has not got ready."""
    trainer = _trainer(session, job)
    return trainer is not None and not was_ready(trainer.report)


def is_base_suspect(session: Session, pack_key: str, worker_id: str, *, now: float) -> bool:
    """Whether it is the base that fails, and not that worker with each that it tries: others have failed as well, or
    the last trainer there of another base got ready."""
    found = _failures(session, pack_key)
    if found is None:
        return False
    return len(found.worker_ids) >= ENOUGH or (
        _fails(session, found, now=now) and _loads_others(session, pack_key, worker_id)
    )


def has_been_loaded(session: Session, pack_key: str) -> bool:
    """By one of the latest trainers."""
    return any(was_ready(trainer.report) for trainer in _latest(session, pack_key))


def is_to_blame(session: Session, job: Job, reason: EndReason, *, now: float) -> bool:
    """Whether the job's base is, and not the node, for an end of its trainer before that was ready: it fails
    everywhere, or no worker is left that could try."""
    trainer = _trainer(session, job)
    if reason not in OF_A_LOAD or trainer is None or was_ready(trainer.report):
        return False
    found = _failures(session, trainer.pack_key)
    return found is not None and _fails(session, found, now=now)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Failures:
    """To load a base that none of its latest trainers has loaded."""

    worker_ids: set[str]
    hosts: Counter[str]
    """Of how many of these workers."""
    job: Job
    """One of those that wanted it."""


def _fails(session: Session, found: _Failures, *, now: float) -> bool:
    """Whether no worker loads it, as far as can be known: enough have failed, or no other is left that could try."""
    return len(found.hosts) >= ENOUGH or not any(
        _could_try(session, worker, found) for worker in session.scalars(select(Worker).where(is_live(now=now)))
    )


def _could_try(session: Session, worker: Worker, found: _Failures) -> bool:
    if worker.id in found.worker_ids or worker.takes_nothing_new or found.hosts[worker.host] >= ENOUGH:
        return False
    description = session.get_one(BaseModelRow, found.job.base_model).description or {}
    group = sharding.reported_group(worker.devices, worker.memory_bytes)
    demand = requirements.demand(found.job, description, recomputes=group.kind == "cuda")
    return group.needed_bytes(demand) <= group.bytes_of_each


def _loads_others(session: Session, pack_key: str, worker_id: str) -> bool:
    others = select(Trainer).where(Trainer.worker_id == worker_id, Trainer.pack_key != pack_key)
    last = session.scalars(others.order_by(Trainer.started_at.desc()).limit(1)).first()
    return last is not None and was_ready(last.report)


def _trainer(session: Session, job: Job) -> Trainer | None:
    return session.get(Trainer, job.trainer_id) if job.trainer_id is not None else None


def _latest(session: Session, pack_key: str) -> Sequence[Trainer]:
    alike = select(Trainer).where(Trainer.pack_key == pack_key)
    return session.scalars(alike.order_by(Trainer.started_at.desc()).limit(LOOKED_AT)).all()


def _failures(session: Session, pack_key: str) -> _Failures | None:
    """Of trainers of this key that ended before they were ready; none where any of the latest got ready."""
    latest = _latest(session, pack_key)
    if any(was_ready(trainer.report) for trainer in latest):
        return None
    ended = (Attempt.trainer_id.in_([trainer.id for trainer in latest]), Attempt.reason.in_(OF_A_LOAD))
    whose = func.coalesce(func.nullif(Attempt.blamed_worker_id, ""), Attempt.worker_id)  # of a gang the one to blame
    worker_ids = set(session.scalars(select(whose).where(*ended).distinct()))
    job = session.scalars(select(Job).join(Attempt, Attempt.job_id == Job.id).where(*ended).limit(1)).first()
    if job is None:
        return None
    hosts = Counter(session.scalars(select(Worker.host).where(Worker.id.in_(worker_ids))))
    return _Failures(worker_ids=worker_ids, hosts=hosts, job=job)


OF_MEMORY = reasons(lambda ending: ending.is_of_memory)
MAX_OUT_OF_MEMORY = 3
"""The last of them alone and slice by slice: a job is not given up before that was tried."""
ALONE = MAX_COUNTED_ATTEMPTS - 1
"""Bad ends from which on a job trains alone."""
SMALLER = "Its next attempt computes smaller ticks."
SMALLEST = "Its next attempt is alone in its trainer, and computes slice by slice."


def num_out_of_memory(session: Session, job_id: str) -> int:
    """Attempts of it that memory has ended, ever; but not while the base was loaded, for which its ticks can't help."""
    of_memory = (Attempt.job_id == job_id, Attempt.reason.in_(OF_MEMORY))
    ended = session.scalar(select(func.count()).select_from(Attempt).where(*of_memory)) or 0
    trainers = session.scalars(select(Trainer).join(Attempt, Attempt.trainer_id == Trainer.id).where(*of_memory))
    return ended - sum(not was_ready(trainer.report) for trainer in trainers)


def num_out_of_memory_at_end(session: Session, job: Job, reason: EndReason) -> int:
    """The same at the end of an attempt, which is among them; 0 where this end is none of them."""
    if reason not in OF_MEMORY or is_of_a_load(session, job):
        return 0
    return num_out_of_memory(session, job.id)


def memory_rung(db: Database, job: Job) -> int:
    """What its trainer is told: 0 for usual ticks, 1 for smaller ones, 2 for one slice at a time."""
    with db.read() as session:
        return _memory_rung(num_out_of_memory(session, job.id), counted_attempts=job.counted_attempts)


def _memory_rung(shortages: int, *, counted_attempts: int) -> int:
    """Smaller ticks once and for all; slice by slice until there is a new checkpoint, while it is alone anyway."""
    return min(shortages, max(1, min(ALONE, counted_attempts)))


def next_attempt_text(shortages: int, *, counted_attempts: int) -> str:
    """Of a job that is tried again, for people."""
    return SMALLEST if _memory_rung(shortages, counted_attempts=counted_attempts) == ALONE else SMALLER


def out_of_memory_text(session: Session, job: Job) -> str:
    """What was tried, and what would hold it: more than the device did on which memory ran out last."""
    tried = "The last one was alone in its trainer, and computed slice by slice."
    worker = session.get(Worker, job.worker_id) if job.worker_id else None
    if worker is None:
        return tried
    description = session.get_one(BaseModelRow, job.base_model).description or {}
    group = sharding.reported_group(worker.devices, worker.memory_bytes)
    demand = requirements.demand(job, description, recomputes=group.kind == "cuda")
    reckoned, held = group.needed_bytes(demand), group.bytes_of_each
    beyond = replace(demand, whole_bytes=demand.whole_bytes + max(0, held - reckoned) + 1)
    fits = sharding.would_fit_sentence(sharding.would_fit(beyond))
    where = "the device" if group.num_devices == 1 else f"the smallest of {group.num_devices} devices"
    told = f"It was reckoned to need about {readable(reckoned)}, and {where} has {readable(held)}, which it shares"
    return f"{tried} {told} with whatever else is there. {fits}"
