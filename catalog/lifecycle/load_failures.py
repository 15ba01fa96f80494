"""Whether a base can be loaded at all, by what became of the latest trainers of its pack key.

Base, dtype and quantisation are a job's choice: a trainer that ended before it was ready may be that choice's doing, or
the node's. It is not the choice's once any trainer got ready with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from catalog.resources import requirements, sharding
from catalog.states import EndReason, reasons
from catalog.tables import Attempt, BaseModelRow, Job, Json, Trainer, Worker
from catalog.tables.living import is_live

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


def is_suspect(session: Session, pack_key: str, worker_id: str, *, now: float) -> bool:
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
    group = sharding.group_told(worker.devices, worker.memory_bytes)
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
