"""Workers and their trainers, and the database's own pulse."""

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
    integrations: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    """Trackers that it can write to; None of workers that said nothing of it."""
    version: Mapped[str]
    protocol: Mapped[int | None] = mapped_column(Integer)
    """See catalog/fleet/compatibility.py. None of those that registered before there was one."""
    memory_bytes: Mapped[int]
    started_at: Mapped[float]
    heartbeat_at: Mapped[float]
    ended_at: Mapped[float | None]
    drain_requested: Mapped[bool] = mapped_column(Boolean)
    cordon: Mapped[Json | None] = mapped_column(JSON(none_as_null=True))
    """Why it takes nothing new: by whom, reason, at, and the service's evidence. None: it does."""
    uncordoned_at: Mapped[float | None]
    """What failed on it before counts no more."""
    resident_base: Mapped[str | None]
    trainer_id: Mapped[str | None]
    report: Mapped[Json | None]
    """Tokens a second, memory in use, versions."""
    served_at: Mapped[Json | None]
    """By project, and then by class as text: when it last claimed the first of these jobs. Workers of the version
    before write the times by class alone."""

    @property
    def takes_nothing_new(self) -> bool:
        """It is cordoned, is to leave, or has left."""
        return self.cordon is not None or self.drain_requested or self.ended_at is not None


class Trainer(Table):
    """One base model resident on one device group, from load to unload."""

    __tablename__ = "trainers"
    id: Mapped[str] = mapped_column(primary_key=True)
    worker_id: Mapped[str] = mapped_column(index=True)
    base_digest: Mapped[str]
    pack_key: Mapped[str]
    started_at: Mapped[float]
    ended_at: Mapped[float | None]
    report: Mapped[Json | None]
    """What it said at start and end: dtype, device, determinism class, versions, memory, exit, speeds of ticks."""
    __table_args__ = (Index(None, "pack_key", "started_at"),)


class Service(Table):
    """One row: what was announced by whoever migrated the database last, of the workers that its service takes."""

    __tablename__ = "service"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    oldest_protocol: Mapped[int] = mapped_column(Integer)
    newest_protocol: Mapped[int] = mapped_column(Integer)
    version: Mapped[str]
    announced_at: Mapped[float]


class DatabaseHeartbeat(Table):
    """One row: when the database was last seen to answer. A gap in it is an outage."""

    __tablename__ = "pulse"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    seen_at: Mapped[float]


class Gang(Table):
    """One row for each name, with the round that its members train in; see catalog/fleet/gangs.py."""

    __tablename__ = "gangs"
    name: Mapped[str] = mapped_column(primary_key=True)
    leader_id: Mapped[str | None]
    """The worker that claims jobs for all of them."""
    size: Mapped[int] = mapped_column(Integer)
    min_size: Mapped[int] = mapped_column(Integer)
    """With fewer members it trains nothing. Both as the member that entered last was told."""
    round_id: Mapped[str | None]
    """None: nobody is called."""
    task: Mapped[Json | None] = mapped_column(JSON(none_as_null=True))
    """What the members of the round load, and where they meet."""
    expires_at: Mapped[float | None]
    """By then the round has started, or it is over."""
    port: Mapped[int | None] = mapped_column(Integer)
    """Where the leader's trainer listens. None: the round gathers."""


class GangSeat(Table):
    """A worker that lends its devices to whoever leads its gang. Whether it lives is on its worker's row."""

    __tablename__ = "gang_seats"
    worker_id: Mapped[str] = mapped_column(primary_key=True)
    gang: Mapped[str] = mapped_column(index=True)
    kind: Mapped[str]
    """cpu or cuda. Those of one round are alike."""
    num_processes: Mapped[int] = mapped_column(Integer)
    """Of a trainer on it."""
    versions: Mapped[str]
    """Of what decides a result. Those of one round have the same."""
    free_bytes: Mapped[int]
    """Memory that each of them could take when it last looked."""
    round_id: Mapped[str | None]
    """The round that it is called to, or was last."""
    first_rank: Mapped[int | None] = mapped_column(Integer)
    """In that round: the number of the first of its processes."""
    joined_at: Mapped[float | None]
    """It has what the round needs."""
    is_leaving: Mapped[bool] = mapped_column(Boolean)
    """It is to leave, and waits until the jobs are saved."""
    num_missed: Mapped[int] = mapped_column(Integer)
    """Rounds in a row that did not begin for its sake: it was late, or could not take part."""
    num_failed: Mapped[int] = mapped_column(Integer, server_default="0")
    """Of those, the ones in which it could not take part for a reason of its own."""
    ended: Mapped[Json | None] = mapped_column(JSON(none_as_null=True))
    """How its part of that round ended: reason, detail, and whether it only followed from another's end."""


SILENT_SECONDS = 60.0
"""A worker that was not heard from for so long is shown as lost."""


def is_live(*, now: float) -> ColumnElement[bool]:
    """In a query: the worker has not ended, and was heard from lately."""
    return and_(Worker.ended_at.is_(None), Worker.heartbeat_at > now - SILENT_SECONDS)


def quantizations_on(devices: list[Any]) -> frozenset[str]:
    """none, and what else the worker said at its start; older workers say nothing."""
    return frozenset({"none"}).union(*(device.get("quantizations", ()) for device in devices))


def has_gpu(devices: list[Any]) -> bool:
    return any(device.get("kind") == "cuda" for device in devices)
