"""Workers as people see them, and what the live ones hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from catalog.db.database import Database, read_clock
from catalog.fleet import gangs
from catalog.fleet.workers import list_workers
from catalog.registry import base_models
from catalog.resources.sharding import reported_group
from catalog.scheduling.snapshot import Capacity
from catalog.spec.job import Precision
from catalog.tables.fleet import SILENT_SECONDS, Gang, GangSeat, Trainer, Worker, has_gpu, is_live, quantizations_on
from catalog.tables.history import Attempt
from catalog.tables.storage import BaseModelRow
from catalog.tables.table import Json

WorkerState = Literal["idle", "busy", "draining", "lost", "ended"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerView:
    worker: Worker
    state: WorkerState
    base_names: list[str]
    """Names of the base that it holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedTrainer:
    """What one live worker holds."""

    base_digest: str | None
    """None: it has no trainer."""
    pack_key: str | None
    """None where the trainer has not said yet."""
    saturation: Any = None
    """What its worker last said of how near to its plateau it is; see catalog/resources/throughput.py."""
    worker_id: str = ""
    takes_nothing_new: bool = False
    cordon: Json | None = None


def workers(db: Database) -> list[WorkerView]:
    """Those that live, and those that ended or fell silent lately; newest first."""
    return _views(db, list_workers(db))


def view(db: Database, worker: Worker) -> WorkerView:
    """Of one."""
    return _views(db, [worker])[0]


def _views(db: Database, rows: list[Worker]) -> list[WorkerView]:
    with db.read() as session:
        now = read_clock(session)
        held = {row.resident_base for row in rows if row.resident_base}
        names, training = _names(session, held), _training(session)
        return [
            WorkerView(
                worker=row,
                state=state_of(row, is_training=row.id in training, now=now),
                base_names=names.get(row.resident_base or "", []),
            )
            for row in rows
        ]


def state_of(worker: Worker, *, is_training: bool, now: float) -> WorkerState:
    """is_training: it holds a job that is running. A base that stays loaded for the next job is no work."""
    if worker.ended_at is not None:
        return "ended"
    if worker.heartbeat_at <= now - SILENT_SECONDS:
        return "lost"
    if worker.drain_requested:
        return "draining"
    return "busy" if is_training else "idle"


def residents(session: Session, *, now: float) -> list[LoadedTrainer]:
    """Of every live worker, by its id."""
    held = select(Worker, Trainer.pack_key).outerjoin(Trainer, Trainer.id == Worker.trainer_id)
    return [
        LoadedTrainer(
            base_digest=worker.resident_base,
            pack_key=pack_key,
            saturation=(worker.report or {}).get("saturation"),
            worker_id=worker.id,
            takes_nothing_new=worker.takes_nothing_new,
            cordon=worker.cordon,
        )
        for worker, pack_key in session.execute(held.where(is_live(now=now)).order_by(Worker.id))
    ]


def auto_precision(session: Session, *, now: float) -> Precision:
    """float32 where none of the workers' devices multiplies bfloat16 in hardware, for which it takes 25 times as long;
    else bfloat16. Where no worker lives, as while a service starts, the one that was seen last stands for all."""
    live = select(Worker.devices).where(is_live(now=now))
    last = select(Worker.devices).order_by(Worker.heartbeat_at.desc()).limit(1)
    rows = session.scalars(live).all() or session.scalars(last).all()
    devices = [device for found in rows for device in found]
    is_slow_everywhere = bool(devices) and not any(device.get("has_bfloat16", True) for device in devices)
    return "float32" if is_slow_everywhere else "bfloat16"


def quantizations(session: Session, *, now: float, only_open: bool = False) -> frozenset[str] | None:
    """Those that some live worker can load a base in; None where no worker lives. only_open: that takes new jobs."""
    live = _live(session, now=now, only_open=only_open)
    return frozenset[str]().union(*(quantizations_of(worker) for worker in live)) if live else None


def quantizations_of(worker: Worker) -> frozenset[str]:
    """none, and what else the worker said at its start; older workers say nothing."""
    return quantizations_on(worker.devices)


def integrations(session: Session, *, now: float) -> frozenset[str] | None:
    """Trackers that some live worker can write to; None where no worker lives."""
    live = list(session.scalars(select(Worker.integrations).where(is_live(now=now))))
    return frozenset[str]().union(*(found or () for found in live)) if live else None


def count_live(session: Session, *, now: float) -> int:
    """Workers."""
    return session.scalar(select(func.count()).select_from(Worker).where(is_live(now=now))) or 0


def empty_capacities(
    session: Session, *, now: float, quantization: str = "none", without: Collection[str] = ()
) -> list[Capacity]:
    """Of each live worker that takes new jobs and can load a base so, with nothing in it: in a gang as much as its
    smallest worker has. without: ids of others."""
    smallest = gangs.smallest_members(session, now=now)
    live = [worker for worker in _live(session, now=now, only_open=True) if worker.id not in without]
    able = [worker for worker in live if quantization in quantizations_of(worker)]
    return [empty_capacity(worker, smallest.get(worker.id)) for worker in able]


def empty_capacity(worker: Worker, smallest: Worker | None = None) -> Capacity:
    """With nothing in it. smallest: of its gang, if what the others have is to count."""
    held = worker.memory_bytes if smallest is None else smallest.memory_bytes
    group = reported_group(worker.devices, held)
    if smallest is not None:
        group = replace(group, smallest=smallest.id)
    return Capacity(max_jobs=1, memory_bytes_free=held, recomputes=is_gpu(worker), group=group)


def _live(session: Session, *, now: float, only_open: bool) -> list[Worker]:
    live = session.scalars(select(Worker).where(is_live(now=now)))
    return [worker for worker in live if not (only_open and worker.takes_nothing_new)]


def reported_capacity(worker: Worker) -> Capacity:
    """What it had free beside its jobs when it last looked; none where it did not say."""
    told: Json = (worker.report or {}).get("capacity") or {}
    return Capacity(
        max_jobs=int(told.get("max_jobs", 0)),
        memory_bytes_free=int(told.get("memory_bytes_free", 0)),
        holding=told.get("holding", "replicated"),
    )


def reported_when_empty(session: Session, worker_ids: Collection[str]) -> list[tuple[str, Capacity]]:
    """Of those of these workers that said what they have free: by their ids, and what that is."""
    found = session.scalars(select(Worker).where(Worker.id.in_(worker_ids)).order_by(Worker.id))
    return [
        (worker.id, replace(empty_capacity(worker), memory_bytes_free=reported_capacity(worker).memory_bytes_free))
        for worker in found
        if "capacity" in (worker.report or {})
    ]


def is_gpu(worker: Worker) -> bool:
    return has_gpu(worker.devices)


def _training(session: Session) -> set[str]:
    """Ids of the workers that hold a running job."""
    return set(session.scalars(select(Attempt.worker_id).where(Attempt.ended_at.is_(None)).distinct()))


def _names(session: Session, digests: set[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    rows = session.execute(
        select(BaseModelRow.digest, BaseModelRow.name).where(BaseModelRow.digest.in_(digests), base_models.IS_THERE)
    )
    for digest, name in rows:
        found.setdefault(digest or "", []).append(name)
    return found


LentDevices = Mapping[str, int]
"""By worker: devices of all members of the round that it leads, its own among them."""


def lent_devices(session: Session) -> LentDevices:
    """Processes on a CPU share it: it is one device. Of workers that lead no round nothing is told."""
    number = func.sum(case((GangSeat.kind == "cuda", GangSeat.num_processes), else_=1))
    called = select(Gang.leader_id, number).join(GangSeat, GangSeat.round_id == Gang.round_id)
    rows = session.execute(called.where(Gang.leader_id.is_not(None)).group_by(Gang.leader_id))
    return {leader_id: int(total) for leader_id, total in rows if leader_id is not None}


def count_devices(worker_id: str | None, devices: Sequence[Mapping[str, Any]] | None, lent_to: LentDevices) -> int:
    """devices: as on the worker's record; None where there is none any more. At least one. Pure."""
    if worker_id is not None and worker_id in lent_to:
        return lent_to[worker_id]
    group = reported_group(devices or (), 0)
    return group.num_devices if group.kind == "cuda" else 1
