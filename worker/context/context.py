"""The state of a running worker: settings, database, store, device, heartbeat, and whether it must shut down."""

from __future__ import annotations

import math
import os
import secrets
import socket
import sys
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
from catalog.fleet.workers import GGUF_CONVERTER
from catalog.queue.notifier import FileNotifier
from catalog.resources import sharding
from catalog.resources.sharding import DeviceGroup, Wanted
from catalog.scheduling.snapshot import Policy
from catalog.settings import InvalidSettings, Settings
from catalog.storage.store import ArtifactStore, open_store
from catalog.tables.table import Json
from worker.context.claim_spans import ClaimSpans
from worker.context.gang_membership import GangMembership
from worker.context.heartbeat import Heartbeat
from worker.inference.server import InferenceServer
from worker.node import devices as node
from worker.node import scratch_dirs
from worker.node.utilization import DeviceWatch, measure
from worker.process import gguf_converter
from worker.process.standby import Standby
from worker.trackers import available, writing_runs

UNFIT = 78
"""Exit status of a worker with invalid settings, or whose version is incompatible with the service (EX_CONFIG)."""


def settings_or_exit() -> Settings:
    """Return the settings. If one is invalid, print the error and exit with UNFIT."""
    try:
        return Settings()
    except InvalidSettings as error:
        sys.stderr.write(error.sentence() + "\n")
        sys.exit(UNFIT)


@dataclass(kw_only=True, slots=True)
class WorkerContext:
    """One worker: it has one device, and at most one trainer at a time."""

    settings: Settings
    db: Database
    store: ArtifactStore
    worker_id: str
    device: node.Device
    heartbeat: Heartbeat
    inference_server: InferenceServer
    notifier: FileNotifier
    """Wake-up notifications from an API server on this data folder, and from the worker's own background tasks."""
    membership: GangMembership | None = None
    """Its membership in a gang, for worker.gang. None for a worker without a gang."""
    standby: Standby | None = None
    """None if the operator has disabled the warm standby."""
    spans: ClaimSpans = field(default_factory=ClaimSpans)
    is_shutdown_requested: Callable[[], bool] = lambda: False
    """Returns True once a signal or an operator has asked the worker to shut down: jobs are saved and released."""
    shutdown: threading.Event = field(default_factory=threading.Event)
    stopping_tasks: threading.Event = field(default_factory=threading.Event)
    """Set while a supervisor that has failed stops its background tasks."""
    load_seconds: float = 900
    """Time limit for a trainer to load its base model, in addition to the time to read its files."""
    progress_seconds: float = 300
    """Time limit between two events of a busy trainer."""
    verifying_seconds: float = 120
    """Time limit between two events during a verification, in which every linear layer causes an event."""
    drain_seconds: float = 20
    """Time limit for a trainer to save a job when the worker shuts down."""
    drain_limit_seconds: float = 60
    """Time limit for a trainer to save all jobs when the worker shuts down."""

    cleaned_at: float = -math.inf
    refused_exports: dict[str, float] = field(default_factory=dict[str, float])
    """Exports that this worker leaves to others for some time, each with the `time.monotonic()` of the refusal."""
    """When files of deleted base models were last searched for, by the monotonic clock."""
    silent_since: float | None = None
    """The time, by the monotonic clock, since which the driver has not reported the free memory of its GPUs. None: it
    reports it."""

    @property
    def policy(self) -> Policy:
        """The parameters of scheduling and accounting."""
        return Policy.of(self.settings)

    @property
    def num_processes(self) -> int:
        """The number of processes of each of its trainers."""
        return self.settings.cpu_processes if self.device.kind == "cpu" else self.device.num_processes

    @property
    def group(self) -> DeviceGroup:
        """The device group of its trainers, for memory estimates."""
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
        """How many bytes of a base model its trainers may offload to the host's memory."""
        if self.device.kind == "cpu":
            return 0
        given = self.settings.cpu_offload_bytes
        part = self.device.host_memory_bytes
        return sharding.host_bytes(part, num_processes=self.num_processes) if given is None else given

    @property
    def led_round(self) -> Round | None:
        """The round of several nodes that this worker leads now."""
        return None if self.membership is None else self.membership.round

    def free_bytes(self) -> int:
        """Return the memory that each process of a trainer may still allocate, on any node of a gang."""
        own = self.own_free_bytes()
        return own if self.membership is None else self.membership.least_free_bytes(own)

    def own_free_bytes(self) -> int:
        """Return this memory for this node. Processes on a CPU share the free memory."""
        free = node.free_bytes(self.device)
        return free // self.num_processes if self.device.kind == "cpu" else free

    @property
    def draining(self) -> bool:
        is_stopping = self.shutdown.is_set() or self.stopping_tasks.is_set()
        return is_stopping or self.heartbeat.drain or self.is_shutdown_requested()

    def stand_by(self) -> None:
        """Prepare the warm standby, because nothing is to be trained now. Call it from a thread that outlives the
        standby process."""
        if self.standby is not None and not self.draining:
            self.standby.prepare()

    def trainers_dir(self) -> Path:
        return self.settings.work_dir() / "trainers"

    def scratch_dir(self) -> Path:
        return self.settings.work_dir() / "scratch"

    def workers_dir(self) -> Path:
        """Return the folder with one lock file for each running worker of this data folder."""
        return self.settings.work_dir() / "workers"


@contextmanager
def open_worker(settings: Settings, *, device: node.Device) -> Generator[WorkerContext]:
    """Yield a registered worker that sends heartbeats for the duration of the block.

    Raises Unavailable. Raises UnfitWorker, before it writes anything, if its version does not suit the service, or if
    the GGUF converter of its settings does not run.
    """
    check_strategy(settings.strategy, gang=settings.gang)
    db = Database(settings.resolved_database_url())
    store = open_store(settings)
    worker_id = f"worker-{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(4)}"
    intervals = {"lease_seconds": settings.lease_seconds, "heartbeat_seconds": settings.heartbeat_seconds}
    touched = settings.work_dir() / f"heartbeat-{socket.gethostname()}"
    heartbeat = Heartbeat(db, worker_id, policy=Policy.of(settings), touched=touched, **intervals)
    notifier = FileNotifier(settings.notification_path())
    context = WorkerContext(
        settings=settings,
        db=db,
        store=store,
        worker_id=worker_id,
        device=device,
        heartbeat=heartbeat,
        inference_server=InferenceServer(settings),
        notifier=notifier,
    )
    for folder in (context.trainers_dir(), context.scratch_dir(), settings.bases_dir()):
        folder.mkdir(parents=True, exist_ok=True)
        scratch_dirs.clean(folder)
    context.workers_dir().mkdir(exist_ok=True)
    with closing(db), scratch_dirs.owned(context.workers_dir() / worker_id):
        compatibility.check(db)
        if settings.gguf_converter is not None:
            gguf_converter.check(settings.gguf_converter, scratch=context.scratch_dir())
        for dead_id in scratch_dirs.clean(context.workers_dir()):
            workers.declare_lost(db, dead_id)  # so its jobs need not wait until their leases expire
        of_worker = logs.all_about({"worker": worker_id})
        with (
            of_worker,
            _serving(context),
            _watched(context),
            _registered(context),
            _in_gang(context),
            _standby(context),
            writing_runs(db, settings),
        ):
            yield context


def check_strategy(wanted: Wanted, *, gang: str | None = None) -> None:
    """Check LORRY_STRATEGY. Raises SystemExit if a base model is to be sharded across nodes, or by DeepSpeed and that
    isn't installed. Doesn't import DeepSpeed."""
    if gang is not None and wanted not in ("auto", "replicated"):
        raise SystemExit(
            f"LORRY_STRATEGY is {wanted}, but a gang ({gang}) can't shard a base model: across nodes, each device "
            "holds a full replica. Set it to auto or replicated, or remove the worker from the gang (unset LORRY_GANG)."
        )
    if wanted.startswith("zero3") and find_spec("deepspeed") is None:
        instead = wanted.replace("zero3", "fsdp2")
        raise SystemExit(
            f"LORRY_STRATEGY is {wanted}, which requires DeepSpeed, but that is not installed. Run "
            f"`pip install 'lorry-server[deepspeed]'`, or set LORRY_STRATEGY to {instead}, which needs the "
            "same memory, or to auto."
        )


@contextmanager
def _serving(context: WorkerContext) -> Generator[None]:
    """Serve inference requests."""
    context.inference_server.start()
    try:
        yield
    finally:
        context.inference_server.close()


@contextmanager
def _watched(context: WorkerContext) -> Generator[None]:
    """Send the utilization of the device with each heartbeat."""
    watch = DeviceWatch(lambda: measure(context.device), seconds=context.settings.heartbeat_seconds)
    context.heartbeat.device_use = watch.latest
    with watch.watching():
        yield


@contextmanager
def _in_gang(context: WorkerContext) -> Generator[None]:
    """Enter the worker's gang, if it has one."""
    if context.settings.gang is not None:
        kind, free_bytes = context.device.kind, context.own_free_bytes
        membership = GangMembership(
            context.settings, context.db, context.worker_id, kind=kind, own_free_bytes=free_bytes
        )
        membership.enter(num_processes=context.num_processes)
        context.membership = membership
    yield


@contextmanager
def _standby(context: WorkerContext) -> Generator[None]:
    """Allow a warm standby during the block, unless the operator has disabled it."""
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
    """Return how this worker trains, for its row in the database. `catalog.resources.sharding.reported_group` reads
    it."""
    group, gang = context.group, context.settings.gang
    own = {"num_processes": group.num_devices, "strategy": group.wanted, "host_bytes": group.host_bytes}
    return own if gang is None else own | {"gang": gang}


@contextmanager
def _registered(context: WorkerContext) -> Generator[None]:
    db, worker_id, device = context.db, context.worker_id, context.device
    converter = () if context.settings.gguf_converter is None else (GGUF_CONVERTER,)
    workers.register_worker(
        db,
        worker_id=worker_id,
        host=socket.gethostname(),
        pid=os.getpid(),
        devices=[device.as_json() | _trains_as(context)],
        version=node.versions()["lorry"],
        integrations=[*available(context.settings), *converter],
        memory_bytes=device.memory_bytes // context.num_processes,
    )
    context.heartbeat.start()
    try:
        yield
    finally:
        context.heartbeat.close()
        with suppress(LorryError):
            workers.end_worker(db, worker_id)
