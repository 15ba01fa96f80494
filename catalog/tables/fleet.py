"""Workers and their trainers, and the database's own pulse."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, Boolean, Index, Integer
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
    prepared_at: Mapped[Json | None]
    """Of workers of the version before; see `Project.class_prepared_at`."""

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


class Pulse(Table):
    """One row: when the database was last seen to answer. A gap in it is an outage."""

    __tablename__ = "pulse"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    seen_at: Mapped[float]
