"""Whether a base can be loaded at all, by what became of the latest trainers of its pack key.

Base, dtype and quantisation are a job's choice: a trainer that ended before it was ready may be that choice's doing, or
the node's. It is not the choice's once any trainer got ready with it.
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from catalog.living import is_live
from catalog.states import ENDINGS, EndReason
from catalog.tables import Attempt, Job, Json, Trainer, Worker

LOOKED_AT = 10
"""Latest trainers of one pack key."""
ENOUGH_WORKERS = 2
"""That have failed to load a base, none having done so, before it is to blame."""
OF_A_LOAD = frozenset(
    reason
    for reason, ending in ENDINGS.items()
    if ending.retryable and ending.counts and reason is not EndReason.NODE_FAILED
)
"""Ends that may be the base's doing, where its trainer never got ready."""


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
    is_of_many = len(_failed_on(session, pack_key)) >= ENOUGH_WORKERS
    return is_of_many or (fails(session, pack_key, now=now) and _loads_others(session, pack_key, worker_id))


def is_to_blame(session: Session, job: Job, reason: EndReason, *, now: float) -> bool:
    """Whether the job's base is, and not the node, for an end of its trainer before that was ready: it fails
    everywhere, or no worker is left that could try."""
    trainer = _trainer(session, job)
    if reason not in OF_A_LOAD or trainer is None or was_ready(trainer.report):
        return False
    return fails(session, trainer.pack_key, now=now)


def fails(session: Session, pack_key: str, *, now: float) -> bool:
    """Whether no worker loads it, as far as can be known: enough have failed, or no other is left that could try."""
    failed_on = _failed_on(session, pack_key)
    return bool(failed_on) and (len(failed_on) >= ENOUGH_WORKERS or not _could_others_try(session, failed_on, now=now))


def _could_others_try(session: Session, failed_on: Collection[str], *, now: float) -> bool:
    live = session.scalars(select(Worker).where(is_live(now=now)))
    return any(worker.id not in failed_on and not worker.takes_nothing_new for worker in live)


def _loads_others(session: Session, pack_key: str, worker_id: str) -> bool:
    others = select(Trainer).where(Trainer.worker_id == worker_id, Trainer.pack_key != pack_key)
    last = session.scalars(others.order_by(Trainer.started_at.desc()).limit(1)).first()
    return last is not None and was_ready(last.report)


def _trainer(session: Session, job: Job) -> Trainer | None:
    return session.get(Trainer, job.trainer_id) if job.trainer_id is not None else None


def _failed_on(session: Session, pack_key: str) -> set[str]:
    """Workers whose trainers of this key ended before they were ready; none where any of the latest got ready."""
    alike = select(Trainer).where(Trainer.pack_key == pack_key)
    latest = session.scalars(alike.order_by(Trainer.started_at.desc()).limit(LOOKED_AT)).all()
    if any(was_ready(trainer.report) for trainer in latest):
        return set()
    ended = (Attempt.trainer_id.in_([trainer.id for trainer in latest]), Attempt.reason.in_(OF_A_LOAD))
    whose = func.coalesce(func.nullif(Attempt.blamed_worker_id, ""), Attempt.worker_id)  # of a gang the one to blame
    return set(session.scalars(select(whose).where(*ended).distinct()))
