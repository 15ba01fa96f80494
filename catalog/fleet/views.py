"""Views of workers for users, and the trainers and capacities of live workers."""

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
from catalog.resources.memory import SLICE_TOKENS
from catalog.resources.sharding import reported_group
from catalog.scheduling.snapshot import Capacity
from catalog.spec.job import FleetDefaults
from catalog.tables.fleet import SILENT_SECONDS, Gang, GangSeat, Trainer, Worker, has_gpu, is_live
from catalog.tables.history import Attempt
from catalog.tables.storage import BaseModelRow
from catalog.tables.table import Json

WorkerState = Literal["idle", "busy", "draining", "lost", "ended"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerView:
    worker: Worker
    state: WorkerState
    base_names: list[str]
    """Names of the base model that the worker has loaded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedTrainer:
    """The loaded trainer of one live worker."""

    base_digest: str | None
    """None if the worker has no trainer."""
    pack_key: str | None
    """None if the trainer has not been registered yet."""
    saturation: Any = None
    """How close the trainer is to its throughput plateau, as last reported; see catalog/resources/throughput.py."""
    worker_id: str = ""
    takes_nothing_new: bool = False
    cordon: Json | None = None


def workers(db: Database) -> list[WorkerView]:
    """Return live workers, and those that stopped or were lost recently; newest first."""
    return _views(db, list_workers(db))


def view(db: Database, worker: Worker) -> WorkerView:
    """Return the view of one worker."""
    return _views(db, [worker])[0]


def _views(db: Database, rows: list[Worker]) -> list[WorkerView]:
    with db.read() as session:
        now = read_clock(session)
        loaded = {row.resident_base for row in rows if row.resident_base}
        names, training = _names(session, loaded), _training(session)
        return [
            WorkerView(
                worker=row,
                state=state_of(row, is_training=row.id in training, now=now),
                base_names=names.get(row.resident_base or "", []),
            )
            for row in rows
        ]


def state_of(worker: Worker, *, is_training: bool, now: float) -> WorkerState:
    """Return the worker's state. is_training: it holds a running job. A base model that is only loaded is not work."""
    if worker.ended_at is not None:
        return "ended"
    if worker.heartbeat_at <= now - SILENT_SECONDS:
        return "lost"
    if worker.drain_requested:
        return "draining"
    return "busy" if is_training else "idle"


def residents(session: Session, *, now: float) -> list[LoadedTrainer]:
    """Return the loaded trainer of every live worker, ordered by worker id. Until its next heartbeat, a worker still
    names a trainer that has ended."""
    live = select(Worker, Trainer.pack_key, Trainer.ended_at).outerjoin(Trainer, Trainer.id == Worker.trainer_id)
    return [
        LoadedTrainer(
            base_digest=worker.resident_base if ended_at is None else None,
            pack_key=pack_key if ended_at is None else None,
            saturation=(worker.report or {}).get("saturation"),
            worker_id=worker.id,
            takes_nothing_new=worker.takes_nothing_new,
            cordon=worker.cordon,
        )
        for worker, pack_key, ended_at in session.execute(live.where(is_live(now=now)).order_by(Worker.id))
    ]


def fleet_defaults(session: Session, *, now: float) -> FleetDefaults:
    """Return the precision and the slice size that suit the live workers.

    The precision is bfloat16, or float32 if no device supports bfloat16 matmuls in hardware, because bfloat16 is then
    25 times slower. Slices have the size for GPUs if there is one. If no worker is live, for example while the service
    starts, the worker with the latest heartbeat decides.
    """
    live = select(Worker.devices).where(is_live(now=now))
    last = select(Worker.devices).order_by(Worker.heartbeat_at.desc()).limit(1)
    rows = session.scalars(live).all() or session.scalars(last).all()
    devices = [device for found in rows for device in found]
    is_slow_everywhere = bool(devices) and not any(device.get("has_bfloat16", True) for device in devices)
    return FleetDefaults(
        precision="float32" if is_slow_everywhere else "bfloat16",
        slice_tokens=SLICE_TOKENS["cuda" if has_gpu(devices) else "cpu"],
    )


def quantizations(session: Session, *, now: float, only_open: bool = False) -> frozenset[str] | None:
    """Return the quantizations that live workers support; None if no worker is live.

    only_open: include only workers that accept new jobs.
    """
    live = _live(session, now=now, only_open=only_open)
    return frozenset[str]().union(*(worker.quantizations for worker in live)) if live else None


def integrations(session: Session, *, now: float) -> frozenset[str] | None:
    """Return the integrations of live workers (see catalog.tables.fleet); None if no worker is live."""
    live = list(session.scalars(select(Worker.integrations).where(is_live(now=now))))
    return frozenset[str]().union(*live) if live else None


def count_live(session: Session, *, now: float) -> int:
    """Return the number of live workers."""
    return session.scalar(select(func.count()).select_from(Worker).where(is_live(now=now))) or 0


def empty_capacities(
    session: Session, *, now: float, quantization: str = "none", without: Collection[str] = ()
) -> list[Capacity]:
    """Return the capacity, without any jobs, of each live worker that accepts new jobs and supports the quantization.

    For a gang member, the memory of the gang's smallest worker counts. without: ids of excluded workers.
    """
    smallest = gangs.smallest_members(session, now=now)
    live = [worker for worker in _live(session, now=now, only_open=True) if worker.id not in without]
    able = [worker for worker in live if quantization in worker.quantizations]
    return [empty_capacity(worker, smallest.get(worker.id)) for worker in able]


def empty_capacity(worker: Worker, smallest: Worker | None = None) -> Capacity:
    """Return the worker's capacity without any jobs. smallest: the gang member whose memory limits the capacity."""
    memory_bytes = worker.memory_bytes if smallest is None else smallest.memory_bytes
    group = reported_group(worker.devices, memory_bytes)
    if smallest is not None:
        group = replace(group, smallest=smallest.id)
    return Capacity(max_jobs=1, memory_bytes_free=memory_bytes, recomputes=worker.has_gpu, group=group)


def _live(session: Session, *, now: float, only_open: bool) -> list[Worker]:
    live = session.scalars(select(Worker).where(is_live(now=now)))
    return [worker for worker in live if not (only_open and worker.takes_nothing_new)]


def reported_capacity(worker: Worker) -> Capacity:
    """Return the free capacity in addition to current jobs, as last reported; zero if the worker reported none."""
    reported: Json = (worker.report or {}).get("capacity") or {}
    return Capacity(
        max_jobs=int(reported.get("max_jobs", 0)),
        memory_bytes_free=int(reported.get("memory_bytes_free", 0)),
        holding=reported.get("holding", "replicated"),
    )


def reported_when_empty(session: Session, worker_ids: Collection[str]) -> list[tuple[str, Capacity]]:
    """Return worker ids with their reported free memory. Workers without a report are omitted."""
    found = session.scalars(select(Worker).where(Worker.id.in_(worker_ids)).order_by(Worker.id))
    return [
        (worker.id, replace(empty_capacity(worker), memory_bytes_free=reported_capacity(worker).memory_bytes_free))
        for worker in found
        if "capacity" in (worker.report or {})
    ]


def _training(session: Session) -> set[str]:
    """Return the ids of workers that hold a running job."""
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
"""Number of devices of a whole round, including the leader's own, by the id of its leader."""


def lent_devices(session: Session) -> LentDevices:
    """Return the number of devices of each open round. A CPU counts as one device, whatever its number of processes."""
    number = func.sum(case((GangSeat.kind == "cuda", GangSeat.num_processes), else_=1))
    called = select(Gang.leader_id, number).join(GangSeat, GangSeat.round_id == Gang.round_id)
    rows = session.execute(called.where(Gang.leader_id.is_not(None)).group_by(Gang.leader_id))
    return {leader_id: int(total) for leader_id, total in rows if leader_id is not None}


def count_devices(worker_id: str | None, devices: Sequence[Mapping[str, Any]] | None, lent_to: LentDevices) -> int:
    """Return the number of devices that a worker trains on, at least one. Pure.

    devices: from the worker's row; None if it no longer exists.
    """
    if worker_id is not None and worker_id in lent_to:
        return lent_to[worker_id]
    group = reported_group(devices or (), 0)
    return group.num_devices if group.kind == "cuda" else 1
