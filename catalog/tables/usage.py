"""What projects have used, by day: kept as it happens, so that nobody has to add up jobs and attempts."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Index, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Table


class UsageDay(Table):
    """Of a project, a day and a base model; its rows together."""

    __tablename__ = "usage_days"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    day: Mapped[int] = mapped_column(Integer, primary_key=True)
    """Days since 1970, in UTC."""
    base_model: Mapped[str] = mapped_column(primary_key=True)
    slot: Mapped[int] = mapped_column(Integer, primary_key=True)
    """Of those who add to it: so that they don't wait for each other."""
    device_seconds: Mapped[float] = mapped_column(default=0.0)
    trained_tokens: Mapped[int] = mapped_column(default=0)
    """Of jobs that succeeded, on the day of their end."""
    num_created: Mapped[int] = mapped_column(default=0)
    num_succeeded: Mapped[int] = mapped_column(default=0)
    num_failed: Mapped[int] = mapped_column(default=0)
    num_cancelled: Mapped[int] = mapped_column(default=0)
    num_plans: Mapped[int] = mapped_column(default=0, server_default="0")
    __table_args__ = (Index(None, "day"),)


class UsageMonth(Table):
    """Device-seconds of a project and a month, of every base model; its rows together."""

    __tablename__ = "usage_months"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    month: Mapped[int] = mapped_column(Integer, primary_key=True)
    """Months since the year 0, in UTC."""
    slot: Mapped[int] = mapped_column(Integer, primary_key=True)
    device_seconds: Mapped[float]


class StoredDay(Table):
    """What a project stored at the end of a day on which that changed, in bytes; of the last day, now."""

    __tablename__ = "stored_days"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    day: Mapped[int] = mapped_column(Integer, primary_key=True)
    num_bytes: Mapped[int]


class StoredBytes(Table):
    """What a project stores, in bytes: stored_bytes.py lists the parts."""

    __tablename__ = "stored_bytes"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    num_bytes: Mapped[int]


class ServiceCounter(Table):
    """One number; its rows together. See catalog/usage/ledger.py."""

    __tablename__ = "tallies"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    label: Mapped[str] = mapped_column(String(64), primary_key=True)
    """What is counted of that name, such as an `EndReason`; empty where there is one number only."""
    slot: Mapped[int] = mapped_column(Integer, primary_key=True)
    """Of those who add to it: so that they don't wait for each other."""
    number: Mapped[int]
