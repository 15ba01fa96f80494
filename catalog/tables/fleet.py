"""Workers, trainers and gangs, and the heartbeat of the database itself."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, Boolean, ColumnElement, Index, Integer, and_
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Json, Table


class Worker(Table):
    __tablename__ = "workers"
    id: Mapped[str] = mapped_column(primary_key=True)
    host: Mapped[str]
    pid: Mapped[int]
    devices: Mapped[list[Any]]
    integrations: Mapped[list[Any]]
    """Trackers that the worker can write to, and catalog.fleet.workers.GGUF_CONVERTER if it has the converter."""
    version: Mapped[str]
    protocol: Mapped[int] = mapped_column(Integer)
    """See catalog/fleet/compatibility.py."""
    memory_bytes: Mapped[int]
    started_at: Mapped[float]
    heartbeat_at: Mapped[float]
    ended_at: Mapped[float | None]
    drain_requested: Mapped[bool] = mapped_column(Boolean)
    cordon: Mapped[Json | None] = mapped_column(JSON(none_as_null=True))
    """The cordon: by, reason, at, evidence (of a cordon by the service). None: not cordoned."""
    uncordoned_at: Mapped[float | None]
    """Failures before this time no longer count toward a cordon."""
    resident_base: Mapped[str | None]
    trainer_id: Mapped[str | None]
    report: Mapped[Json | None]
    """Tokens per second, memory in use, versions."""
    served_at: Mapped[Json | None]
    """When the worker last claimed the first job of a project and class: {project: {class, as text: time}}."""

    @property
    def takes_nothing_new(self) -> bool:
        """Whether the worker is cordoned, draining or stopped."""
        return self.cordon is not None or self.drain_requested or self.ended_at is not None

    @property
    def quantizations(self) -> frozenset[str]:
        """`none` and the quantizations that the worker reported at its start."""
        return quantizations_on(self.devices)

    @property
    def has_gpu(self) -> bool:
        return has_gpu(self.devices)


class Trainer(Table):
    """One base model resident on one device group, from load to unload."""

    __tablename__ = "trainers"
    id: Mapped[str] = mapped_column(primary_key=True)
    worker_id: Mapped[str] = mapped_column(index=True)
    base_digest: Mapped[str]
    pack_key: Mapped[str]
    started_at: Mapped[float]
    ended_at: Mapped[float | None]
    address: Mapped[str | None]
    """HOST:PORT, where its worker answers inference requests. None: it is not loaded."""
    secret: Mapped[str | None]
    """The bearer token that the worker expects there."""
    report: Mapped[Json | None]
    """Reported at start and at exit: dtype, device, determinism class, versions, memory, exit, tick speeds."""
    __table_args__ = (Index(None, "pack_key", "started_at"),)


class Service(Table):
    """One row: the worker protocols that the service accepts, as announced by the last migration of the database."""

    __tablename__ = "service"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    oldest_protocol: Mapped[int] = mapped_column(Integer)
    newest_protocol: Mapped[int] = mapped_column(Integer)
    version: Mapped[str]


class DatabaseHeartbeat(Table):
    """One row: when the database last answered. A gap is an outage."""

    __tablename__ = "pulse"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    seen_at: Mapped[float]


class Gang(Table):
    """One gang, by name, and the round in which its members train; see catalog/fleet/gangs.py."""

    __tablename__ = "gangs"
    name: Mapped[str] = mapped_column(primary_key=True)
    leader_id: Mapped[str | None]
    """The worker that claims jobs for the whole gang."""
    size: Mapped[int] = mapped_column(Integer)
    min_size: Mapped[int] = mapped_column(Integer)
    """The gang trains nothing with fewer members. The last member that entered sets both sizes."""
    round_id: Mapped[str | None]
    """None: there is no round."""
    task: Mapped[Json | None] = mapped_column(JSON(none_as_null=True))
    """The base model that the members of the round load, and the address at which they meet."""
    expires_at: Mapped[float | None]
    """A round that has not started by this time is over."""
    port: Mapped[int | None] = mapped_column(Integer)
    """Port of the leader's trainer. None: members are still joining."""


class GangSeat(Table):
    """A worker that provides its devices to the leader of its gang. The worker's row shows whether it is live."""

    __tablename__ = "gang_seats"
    worker_id: Mapped[str] = mapped_column(primary_key=True)
    gang: Mapped[str] = mapped_column(index=True)
    kind: Mapped[str]
    """cpu or cuda; the same for all members of a round."""
    num_processes: Mapped[int] = mapped_column(Integer)
    """Processes of a trainer on this worker."""
    versions: Mapped[str]
    """Versions of the software that affects results; the same for all members of a round."""
    free_bytes: Mapped[int]
    """Memory that was free for each process at the last measurement."""
    round_id: Mapped[str | None]
    """The current round of the worker, or its last one."""
    first_rank: Mapped[int | None] = mapped_column(Integer)
    """Rank of the worker's first process in that round."""
    joined_at: Mapped[float | None]
    """When the worker had everything that the round needs."""
    is_leaving: Mapped[bool] = mapped_column(Boolean)
    """The worker is asked to leave, and waits until the leader has saved the jobs."""
    num_missed: Mapped[int] = mapped_column(Integer)
    """Consecutive rounds that did not start because this worker was late or could not take part."""
    num_failed: Mapped[int] = mapped_column(Integer, server_default="0")
    """Those of the missed rounds in which the worker itself was at fault."""
    ended: Mapped[Json | None] = mapped_column(JSON(none_as_null=True))
    """How the worker's part of that round ended: reason, detail, and whether it is a cascading failure."""


SILENT_SECONDS = 60.0
"""A worker without a heartbeat for longer than this is shown as lost."""


def is_live(*, now: float) -> ColumnElement[bool]:
    """Return the query condition for workers that have not stopped and have a recent heartbeat."""
    return and_(Worker.ended_at.is_(None), Worker.heartbeat_at > now - SILENT_SECONDS)


def quantizations_on(devices: list[Any]) -> frozenset[str]:
    """Return `none` and the quantizations that a worker reported for its devices."""
    return frozenset({"none"}).union(*(device.get("quantizations", ()) for device in devices))


def has_gpu(devices: list[Any]) -> bool:
    return any(device.get("kind") == "cuda" for device in devices)
