"""Registers workers and trainers, and records their heartbeats and ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from catalog.db.database import Database, read_clock
from catalog.fleet import compatibility, cordons
from catalog.lifecycle import recovery
from catalog.lifecycle.outcomes import end_attempt
from catalog.states import EndReason, JobState
from catalog.tables.fleet import SILENT_SECONDS, Trainer, Worker
from catalog.tables.jobs import Job
from catalog.tables.table import Json

GGUF_CONVERTER = "gguf-converter"
"""Integration of a worker that has llama.cpp's converter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerOrders:
    """Orders for a worker, returned by its heartbeat."""

    drain: bool


def register_worker(
    db: Database,
    *,
    worker_id: str,
    host: str,
    pid: int,
    devices: list[Any],
    version: str,
    memory_bytes: int,
    integrations: Sequence[str] = (),
    protocol: int | None = None,
) -> Worker:
    """Register a worker that has started. Jobs of an earlier worker with the same id are released immediately.

    protocol: this code's own if None. Raises UnfitWorker if the worker is incompatible with the service; then nothing
    is written.
    """
    protocol = compatibility.PROTOCOL if protocol is None else protocol
    with db.write() as session:
        compatibility.check_in(session, protocol=protocol)
        now = read_clock(session)
        worker = session.get(Worker, worker_id, with_for_update=True)
        if worker is None:
            worker = Worker(id=worker_id)
            session.add(worker)
        else:
            recovery.lose_worker(session, worker_id, detail=f"Worker {worker_id} was restarted.", now=now)
            _close_trainers(session, worker_id, now=now)
        worker.host, worker.pid, worker.devices = host, pid, devices
        worker.version, worker.protocol, worker.memory_bytes = version, protocol, memory_bytes
        worker.integrations = list(integrations)
        worker.started_at = worker.heartbeat_at = now
        worker.ended_at = worker.resident_base = worker.trainer_id = worker.report = None
        worker.served_at = None
        worker.drain_requested, worker.uncordoned_at, worker.cordon = False, None, None
        cordons.inherit(session, worker, is_live_after=now - SILENT_SECONDS)
        return worker


def worker_beat(
    db: Database, worker_id: str, *, resident_base: str | None, trainer_id: str | None, report: Json | None
) -> WorkerOrders:
    """Record a heartbeat, and return orders.

    A worker that was declared stopped, or whose protocol an upgraded service no longer supports, is ordered to drain.
    """
    with db.write() as session:
        worker = session.get(Worker, worker_id, with_for_update=True)
        if worker is None or worker.ended_at is not None:
            return WorkerOrders(drain=True)
        worker.heartbeat_at = read_clock(session)
        worker.resident_base, worker.trainer_id, worker.report = resident_base, trainer_id, report
        if not worker.drain_requested:
            window = compatibility.window_of(session)
            if not window.has(worker.protocol):
                cordons.retire(session, worker, window.version, now=worker.heartbeat_at)
        cordons.inherit_late(session, worker, now=worker.heartbeat_at, silent_seconds=SILENT_SECONDS)
        return WorkerOrders(drain=worker.drain_requested)


def end_worker(db: Database, worker_id: str) -> None:
    """Record a clean shutdown of a worker. Its remaining jobs are released, and their attempts do not count."""
    with db.write() as session:
        now = read_clock(session)
        worker = session.get(Worker, worker_id, with_for_update=True)
        if worker is None or worker.ended_at is not None:
            return
        worker.ended_at = now
        worker.resident_base = worker.trainer_id = None
        claimed = (Job.state == JobState.RUNNING, Job.worker_id == worker_id, Job.claim_id.is_not(None))
        locked = session.scalars(select(Job).where(*claimed).order_by(Job.id).with_for_update())
        for job in recovery.in_lock_order(locked):
            end_attempt(session, job, reason=EndReason.DRAINED, detail=f"Worker {worker_id} shut down.", now=now)
        _close_trainers(session, worker_id, now=now)


def declare_lost(db: Database, worker_id: str) -> int:
    """Release the jobs of a worker whose process has died, without waiting for its leases. Returns their number."""
    with db.write() as session:
        now = read_clock(session)
        worker = session.get(Worker, worker_id, with_for_update=True)
        if worker is None or worker.ended_at is not None:
            return 0
        worker.ended_at = now
        worker.resident_base = worker.trainer_id = None
        _close_trainers(session, worker_id, now=now)
        return recovery.lose_worker(session, worker_id, detail=f"The process of worker {worker_id} has ended.", now=now)


def list_workers(db: Database, *, ended_within_seconds: float = 3600) -> list[Worker]:
    """Return live workers, and those that stopped or were lost recently; newest first."""
    with db.read() as session:
        since = read_clock(session) - ended_within_seconds
        recent = select(Worker).where(Worker.heartbeat_at >= since)
        return list(session.scalars(recent.order_by(Worker.started_at.desc(), Worker.id)))


def register_trainer(
    db: Database, *, trainer_id: str, worker_id: str, base_digest: str, pack_key: str, report: Json | None = None
) -> Trainer:
    """Register a trainer that loads a base model on a device group."""
    with db.write() as session:
        trainer = Trainer(id=trainer_id, worker_id=worker_id, base_digest=base_digest, pack_key=pack_key)
        trainer.started_at, trainer.report = read_clock(session), report
        session.add(trainer)
        return trainer


def end_trainer(db: Database, trainer_id: str, *, report: Json | None = None) -> None:
    """Record the end of a trainer, clean or not. `report` is merged into the trainer's earlier report."""
    with db.write() as session:
        trainer = session.get(Trainer, trainer_id, with_for_update=True)
        if trainer is None:
            return
        trainer.ended_at = trainer.ended_at or read_clock(session)
        if report is not None:
            trainer.report = {**(trainer.report or {}), **report}


def report_trainer(db: Database, trainer_id: str, *, report: Json, address: str, secret: str) -> None:
    """Record that a trainer has loaded its base model, and where it answers inference requests. Merges its report:
    dtype, device, determinism class, versions, memory."""
    with db.write() as session:
        trainer = session.get(Trainer, trainer_id, with_for_update=True)
        if trainer is not None:
            trainer.report = {**(trainer.report or {}), **report}
            trainer.address, trainer.secret = address, secret


def _close_trainers(session: Session, worker_id: str, *, now: float) -> None:
    unfinished = (Trainer.worker_id == worker_id, Trainer.ended_at.is_(None))
    session.execute(update(Trainer).where(*unfinished).values(ended_at=now))
