"""Memory that ran out for a job: how often, what its next attempt does for that, and what would hold it at last.

A ladder over attempts, for whatever ends a trainer can be tried no smaller within it: smaller ticks, then alone and
slice by slice, then `failed`. Where a trainer can go on, it has halved its ticks down to one slice before.
"""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from catalog.db.database import Database
from catalog.lifecycle import load_failures
from catalog.resources import requirements, sharding
from catalog.resources.memory import readable
from catalog.states import MAX_COUNTED_ATTEMPTS, EndReason, reasons
from catalog.tables import Attempt, BaseModelRow, Job, Trainer, Worker

OF_MEMORY = reasons(lambda ending: ending.is_of_memory)
MAX_SHORTAGES = 3
"""The last of them alone and slice by slice: a job is not given up before that was tried."""
ALONE = MAX_COUNTED_ATTEMPTS - 1
"""Bad ends from which on a job trains alone."""
SMALLER = "Its next attempt computes smaller ticks."
SMALLEST = "Its next attempt is alone in its trainer, and computes slice by slice."


def number(session: Session, job_id: str) -> int:
    """Attempts of it that memory has ended, ever; but not while the base was loaded, for which its ticks can't help."""
    of_memory = (Attempt.job_id == job_id, Attempt.reason.in_(OF_MEMORY))
    ended = session.scalar(select(func.count()).select_from(Attempt).where(*of_memory)) or 0
    trainers = session.scalars(select(Trainer).join(Attempt, Attempt.trainer_id == Trainer.id).where(*of_memory))
    return ended - sum(not load_failures.was_ready(trainer.report) for trainer in trainers)


def of_this(session: Session, job: Job, reason: EndReason) -> int:
    """The same at the end of an attempt, which is among them; 0 where this end is none of them."""
    if reason not in OF_MEMORY or load_failures.is_of_a_load(session, job):
        return 0
    return number(session, job.id)


def rung(db: Database, job: Job) -> int:
    """What its trainer is told: 0 for usual ticks, 1 for smaller ones, 2 for one slice at a time."""
    with db.read() as session:
        return _rung(number(session, job.id), counted_attempts=job.counted_attempts)


def _rung(shortages: int, *, counted_attempts: int) -> int:
    """Smaller ticks once and for all; slice by slice until there is a new checkpoint, while it is alone anyway."""
    return min(shortages, max(1, min(ALONE, counted_attempts)))


def what_next(shortages: int, *, counted_attempts: int) -> str:
    """Of a job that is tried again, for people."""
    return SMALLEST if _rung(shortages, counted_attempts=counted_attempts) == ALONE else SMALLER


def given_up(session: Session, job: Job) -> str:
    """What was tried, and what would hold it: more than the device did on which memory ran out last."""
    tried = "The last one was alone in its trainer, and computed slice by slice."
    worker = session.get(Worker, job.worker_id) if job.worker_id else None
    if worker is None:
        return tried
    description = session.get_one(BaseModelRow, job.base_model).description or {}
    group = sharding.group_told(worker.devices, worker.memory_bytes)
    demand = requirements.demand(job, description, recomputes=group.kind == "cuda")
    reckoned, held = group.needed_bytes(demand), group.bytes_of_each
    beyond = replace(demand, whole_bytes=demand.whole_bytes + max(0, held - reckoned) + 1)
    fits = sharding.would_fit_sentence(sharding.would_fit(beyond))
    where = "the device" if group.num_devices == 1 else f"the smallest of {group.num_devices} devices"
    told = f"It was reckoned to need about {readable(reckoned)}, and {where} has {readable(held)}, which it shares"
    return f"{tried} {told} with whatever else is there. {fits}"
