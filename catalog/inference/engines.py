"""The trainers that answer requests with the built-in engine, and the base models that workers are to load for it.

A loaded trainer serves an OpenAI-compatible HTTP API at the address in its row (worker/session/inference.py). If no
trainer has the base model of a request, the API server records it as wanted, and a worker claims the task to load it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sqlalchemy import case, delete, select, true
from sqlalchemy.orm import Session

from catalog.db.database import Database, lower, read_clock
from catalog.error_texts import ErrorText
from catalog.fleet import views
from catalog.inference.requests import Model, NoWorker
from catalog.resources.pack_key import quantization_of
from catalog.tables.fleet import Trainer, Worker, is_live
from catalog.tables.serving import WantedBase
from catalog.tables.table import Json
from catalog.tables.tasks import Task
from catalog.tasks import outcomes, task_queue
from catalog.tasks.outcomes import TaskSubject
from catalog.tasks.task_queue import TaskClaim, TaskKind

WANTED_SECONDS = 15.0
"""How long a base model stays wanted after a request that waits for it last asked. It asks every few seconds."""
RESTART_SECONDS = 120.0
"""Requests are accepted for this time after the last worker was seen, which may be restarting."""
MAX_BASES = 16
"""Maximum number of base models that a worker considers for loading at once."""
NOT_BEGUN = "not_begun"
"""Code of a worker's error: the trainer was unloaded before it began to answer, so another one is to be found."""
LOAD_FAILED = ErrorText.of("inference_failed")
INTERRUPTED = "answer_interrupted"
"""Code of a worker's error: the trainer was lost, or is being unloaded, while it answered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerAddress:
    """Where a loaded trainer answers requests: HOST:PORT, and the secret that its worker expects as a bearer token."""

    trainer_id: str
    address: str
    secret: str = field(repr=False)


def trainers_of(db: Database, pack_key: str) -> tuple[list[TrainerAddress], float]:
    """Return the trainers of live workers that answer requests for this pack key, and the time of the query."""
    with db.read() as session:
        now = read_clock(session)
        is_open = (Worker.cordon.is_(None), ~Worker.drain_requested, is_live(now=now))
        is_loaded = (Trainer.pack_key == pack_key, Trainer.ended_at.is_(None))
        found = (
            select(Trainer.id, Trainer.address, Trainer.secret)
            .join(Worker, Worker.trainer_id == Trainer.id)
            .where(*is_open, *is_loaded, Trainer.address.is_not(None))
        )
        rows = session.execute(found).all()
    return [TrainerAddress(trainer_id=ident, address=place or "", secret=key or "") for ident, place, key in rows], now


def want(db: Database, model: Model, *, since: float, is_batch: bool) -> Json | None:
    """Have a worker load the base model of a request that waits. Returns why it could not be loaded since the time
    `since`, when the request began to wait; None if it may still be.

    Raises NoWorker if no worker is running, unless the request belongs to a batch, which waits for one.
    """
    with db.write() as session:
        now = read_clock(session)
        recent = select(Worker.id).where(Worker.heartbeat_at > now - RESTART_SECONDS).limit(1)
        if not is_batch and session.scalar(recent) is None:
            raise NoWorker("no_worker")
        wish = {"pack_key": model.pack_key, "base_model": model.base_model, "base_digest": model.base_digest}
        times = {"wanted_since": now, "wanted_until": 0.0, "clients_until": 0.0}
        lower(session, WantedBase, wish | times, "wanted_since")  # locks the row, although others add and delete it
        row = session.get_one(WantedBase, model.pack_key, with_for_update=True)
        if row.failed_at is not None and row.failed_at >= since:
            return row.error
        if row.wanted_until <= now:
            row.wanted_since, row.clients_until = now, 0.0
        row.base_model, row.base_digest = model.base_model, model.base_digest
        row.error = row.failed_at = None
        row.wanted_until = now + WANTED_SECONDS
        if not is_batch:
            row.clients_until = row.wanted_until
        if session.get(Task, (TaskKind.LOAD, model.pack_key)) is None:
            task_queue.add(session, TaskKind.LOAD, model.pack_key, project_id=None, run_after=now)
        return None


def wanted(db: Database, *, worker_id: str, waited_seconds: float = 0.0, with_batches: bool = True) -> list[WantedBase]:
    """Return the wanted base models that no trainer has and no worker loads. Those of clients are first, then those
    that have been wanted the longest.

    Those with a quantization that this worker does not support are omitted. waited_seconds: newer ones do not count.
    with_batches: whether those that only batches want count.
    """
    with db.read() as session:
        now = read_clock(session)
        worker = session.get(Worker, worker_id)
        if worker is not None and worker.takes_nothing_new:
            return []
        residents = views.residents(session, now=now)
        loaded = {each.pack_key for each in residents if each.pack_key is not None and not each.takes_nothing_new}
        is_for_clients = WantedBase.clients_until > now
        found = (
            select(WantedBase)
            .where(WantedBase.pack_key.in_(task_queue.due([TaskKind.LOAD], now=now).with_only_columns(Task.subject)))
            .where(WantedBase.pack_key.not_in(loaded), WantedBase.wanted_until > now)
            .where(WantedBase.wanted_since <= now - waited_seconds, true() if with_batches else is_for_clients)
            .order_by(case((is_for_clients, 0), else_=1), WantedBase.wanted_since)
            .limit(MAX_BASES)
        )
        can_load = worker.quantizations if worker is not None else frozenset({"none"})
        return [row for row in session.scalars(found) if quantization_of(row.pack_key) in can_load]


def reserve(db: Database, pack_key: str, *, worker_id: str, lease_seconds: float) -> TaskClaim | None:
    """Claim the task to load a wanted base model. Returns None if another worker was faster, or if it has failed too
    often."""
    claimed = task_queue.claim(db, [TaskKind.LOAD], lease_seconds=lease_seconds, worker_id=worker_id, subject=pack_key)
    if claimed is not None and claimed.is_exhausted:
        outcomes.fail_lost(db, claimed, LOAD)
        return None
    return claimed


def note_loaded(db: Database, claimed: TaskClaim) -> None:
    """Record that a trainer has the base model. Raises StaleClaim."""
    with db.write() as session:
        task_queue.finish(session, claimed)


def _fail_load(session: Session, row: WantedBase, error: ErrorText, _is_refused: bool) -> None:
    """Fail the requests that wait for the base model."""
    row.error, row.failed_at = error.report(), read_clock(session)


def _postpone_load(_session: Session, _row: WantedBase, _error: ErrorText | None, _run_after: float | None) -> None:
    """The requests wait on."""


LOAD = TaskSubject(table=WantedBase, lost="inference_failed", fail=_fail_load, postpone=_postpone_load)


def remove_lapsed(db: Database) -> None:
    """Forget the base models that no request waits for any more, unless a worker is loading one."""
    with db.write() as session:
        now = read_clock(session)
        lapsed = select(WantedBase.pack_key).where(WantedBase.wanted_until <= now).with_for_update(skip_locked=True)
        for pack_key in session.scalars(lapsed).all():
            task = session.get(Task, (TaskKind.LOAD, pack_key), with_for_update=True)
            if task is not None and (task.lease_expires_at or 0.0) > now:
                continue
            task_queue.remove(session, TaskKind.LOAD, pack_key)
            session.execute(delete(WantedBase).where(WantedBase.pack_key == pack_key))


def why_unanswered(db: Database, model: Model) -> NoWorker:
    """Return the error for a request that no trainer has begun to answer in time, by the state of the workers."""
    with db.read() as session:
        now = read_clock(session)
        residents = views.residents(session, now=now)
        task = session.get(Task, (TaskKind.LOAD, model.pack_key))
        is_loading = task is not None and (task.lease_expires_at or 0.0) > now
    if is_loading:
        return NoWorker("inference_timeout_while_loading", base=model.base_model)
    if not residents:
        return NoWorker("inference_timeout_without_worker")
    if all(each.takes_nothing_new for each in residents):
        return NoWorker("inference_timeout_of_cordoned_workers")
    if any(each.pack_key == model.pack_key for each in residents):
        return NoWorker("inference_timeout_of_busy_workers", base=model.base_model)
    return NoWorker("inference_timeout_without_free_worker", base=model.base_model)
