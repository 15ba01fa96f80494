"""What a worker has while it lives: settings, database, store, device, heartbeat, and whether to leave."""

from __future__ import annotations

import math
import os
import secrets
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from catalog import logs
from catalog.db.database import Database
from catalog.errors import LorryError
from catalog.fleet import compatibility, workers
from catalog.fleet.gangs import Round
from catalog.queue.notifier import FileDoorbell
from catalog.resources import sharding
from catalog.resources.sharding import DeviceGroup, Wanted
from catalog.scheduling.snapshot import Policy
from catalog.settings import Settings
from catalog.storage.store import ArtifactStore, open_store
from catalog.tables.table import Json
from worker.context.claim_spans import ClaimSpans
from worker.context.gang_membership import Seat
from worker.context.heartbeat import Heartbeat
from worker.node import devices as node
from worker.node import scratch_dirs
from worker.node.utilization import DeviceWatch, measure
from worker.process.standby import Standby
from worker.trackers.exporter import exporting
from worker.trackers.session import available

UNFIT = 78
"""Exit status of a worker whose version can't work with the service's (EX_CONFIG)."""


@dataclass(kw_only=True, slots=True)
class WorkerContext:
    """One worker: it has one device, and at most one trainer at a time."""

    settings: Settings
    db: Database
    store: ArtifactStore
    worker_id: str
    device: node.Device
    heartbeat: Heartbeat
    bell: FileDoorbell
    """Rung by an api on this data folder, and by the worker's own chores."""
    seat: Seat | None = None
    """Its membership of a gang, which worker.gang acts on. None for a worker by itself."""
    standby: Standby | None = None
    """None where the operator wants no trainer to stand by."""
    spans: ClaimSpans = field(default_factory=ClaimSpans)
    has_asked_to_leave: Callable[[], bool] = lambda: False
    """True once a signal or an operator wants the worker gone: jobs are saved and released."""
    leave: threading.Event = field(default_factory=threading.Event)
    load_seconds: float = 900
    """A trainer that has not loaded its base model by then is given up."""
    progress_seconds: float = 300
    """A busy trainer that says nothing for so long is given up."""
    verifying_seconds: float = 120
    """The same where it speaks after every linear, amid the passes of a verification."""
    drain_seconds: float = 20
    """How long the trainer has for saving every job when the worker leaves."""

    cleaned_at: float = -math.inf
    """When the files of deleted bases were last looked for, by the monotonic clock."""
    silent_since: float | None = None
    """Since when the driver does not tell what is free of its GPUs, by the monotonic clock. None: it tells."""

    @property
    def policy(self) -> Policy:
        """The numbers by which is decided and charged."""
        return Policy.of(self.settings)

    @property
    def num_processes(self) -> int:
        """Of its trainers."""
        return self.settings.cpu_processes if self.device.kind == "cpu" else self.device.num_processes

    @property
    def group(self) -> DeviceGroup:
        """What its trainers run on, for reckoning."""
        return DeviceGroup(
            kind=self.device.kind,
            num_devices=self.num_processes,
            bytes_of_each=self.device.memory_bytes // self.num_processes,
            wanted=self.settings.strategy,
            gang=self.settings.gang,
            host_bytes=self.host_bytes,
        )

    @property
    def host_bytes(self) -> int:
        """Of a base that its trainers may have in the host's memory."""
        if self.device.kind == "cpu":
            return 0
        given = self.settings.cpu_offload_bytes
        part = self.device.host_memory_bytes
        return sharding.host_bytes(part, num_processes=self.num_processes) if given is None else given

    @property
    def led_round(self) -> Round | None:
        """The round of several nodes that this worker leads now."""
        return None if self.seat is None else self.seat.round

    def free_bytes(self) -> int:
        """Memory that each process of a trainer may still take, on any node of a gang."""
        own = self.own_free_bytes()
        return own if self.seat is None else self.seat.least_free_bytes(own)

    def own_free_bytes(self) -> int:
        """On this node; processes on a CPU share what there is."""
        free = node.free_bytes(self.device)
        return free // self.num_processes if self.device.kind == "cpu" else free

    @property
    def draining(self) -> bool:
        return self.leave.is_set() or self.heartbeat.drain or self.has_asked_to_leave()

    def stand_by(self) -> None:
        """Nothing is to be trained now: have a trainer ready for what comes. From a thread that outlives it."""
        if self.standby is not None and not self.draining:
            self.standby.prepare()

    def trainers_dir(self) -> Path:
        return self.settings.work_dir() / "trainers"

    def scratch_dir(self) -> Path:
        return self.settings.work_dir() / "scratch"

    def workers_dir(self) -> Path:
        """Holds one locked name for each worker that lives on this data folder."""
        return self.settings.work_dir() / "workers"


@contextmanager
def open_worker(settings: Settings, *, device: node.Device) -> Generator[WorkerContext]:
    """A registered worker whose heart beats, for as long as the block lasts. Raises Unavailable, and UnfitWorker where
    its version can't work with the service's: then it has written nothing."""
    check_strategy(settings.strategy, gang=settings.gang)
    db = Database(settings.resolved_database_url())
    store = open_store(settings)
    worker_id = f"worker-{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(4)}"
    beats = {"lease_seconds": settings.lease_seconds, "heartbeat_seconds": settings.heartbeat_seconds}
    heartbeat = Heartbeat(db, worker_id, policy=Policy.of(settings), **beats)
    bell = FileDoorbell(settings.bell_path())
    context = WorkerContext(
        settings=settings, db=db, store=store, worker_id=worker_id, device=device, heartbeat=heartbeat, bell=bell
    )
    for folder in (context.trainers_dir(), context.scratch_dir(), settings.bases_dir()):
        folder.mkdir(parents=True, exist_ok=True)
        scratch_dirs.clean(folder)
    context.workers_dir().mkdir(exist_ok=True)
    with closing(db), scratch_dirs.owned(context.workers_dir() / worker_id):
        compatibility.check(db)
        for dead_id in scratch_dirs.clean(context.workers_dir()):
            workers.declare_lost(db, dead_id)  # its jobs need not wait for the end of their leases
        of_worker = logs.all_about({"worker": worker_id})
        with (
            of_worker,
            _watched(context),
            _registered(context),
            _seated(context),
            _standby(context),
            exporting(db, settings),
        ):
            yield context


def check_strategy(wanted: Wanted, *, gang: str | None = None) -> None:
    """Ends the program where bases are to be divided over nodes, or by DeepSpeed and that isn't installed. It is not
    imported."""
    if gang is not None and wanted not in ("auto", "replicated"):
        raise SystemExit(
            f"LORRY_STRATEGY is {wanted}, and the workers of a gang ({gang}) divide no base: over nodes each device "
            "holds the whole one. Set it to auto or replicated, or take the worker out of the gang (no LORRY_GANG)."
        )
    if wanted.startswith("zero3") and find_spec("deepspeed") is None:
        instead = wanted.replace("zero3", "fsdp2")
        raise SystemExit(
            f"LORRY_STRATEGY is {wanted}, which needs DeepSpeed, and that is not installed here. Run pip install "
            f"'lorry-server[deepspeed]', or set LORRY_STRATEGY to {instead}, which needs the same memory, or to auto."
        )


@contextmanager
def _watched(context: WorkerContext) -> Generator[None]:
    """How busy its device is goes with each heartbeat."""
    watch = DeviceWatch(lambda: measure(context.device), seconds=context.settings.heartbeat_seconds)
    context.heartbeat.device_use = watch.latest
    with watch.watching():
        yield


@contextmanager
def _seated(context: WorkerContext) -> Generator[None]:
    """In its gang, where it is of one."""
    if context.settings.gang is not None:
        kind, free_bytes = context.device.kind, context.own_free_bytes
        seat = Seat(context.settings, context.db, context.worker_id, kind=kind, own_free_bytes=free_bytes)
        seat.enter(num_processes=context.num_processes)
        context.seat = seat
    yield


@contextmanager
def _standby(context: WorkerContext) -> Generator[None]:
    """It may have one; none is left after the block."""
    if not context.settings.standby_trainer:
        yield
        return
    silence_seconds = context.settings.lease_seconds
    context.standby = Standby(
        context.trainers_dir(),
        context.device,
        silence_seconds=silence_seconds,
        bases_dir=context.settings.bases_dir(),
        num_processes=context.num_processes,
        in_gang=context.settings.gang is not None,
    )
    context.heartbeat.on_every_beat = context.standby.send_heartbeat
    try:
        yield
    finally:
        context.standby.close()


def _trains_as(context: WorkerContext) -> Json:
    """How this worker trains, for its row in the database. `catalog.resources.sharding.reported_group` reads it."""
    group, gang = context.group, context.settings.gang
    own = {"num_processes": group.num_devices, "strategy": group.wanted, "host_bytes": group.host_bytes}
    return own if gang is None else own | {"gang": gang}


@contextmanager
def _registered(context: WorkerContext) -> Generator[None]:
    db, worker_id, device = context.db, context.worker_id, context.device
    workers.register_worker(
        db,
        worker_id=worker_id,
        host=socket.gethostname(),
        pid=os.getpid(),
        devices=[device.as_json() | _trains_as(context)],
        version=node.versions()["lorry"],
        integrations=available(context.settings),
        memory_bytes=device.memory_bytes // context.num_processes,
    )
    context.heartbeat.start()
    try:
        yield
    finally:
        context.heartbeat.close()
        with suppress(LorryError):
            workers.end_worker(db, worker_id)
