"""Usage of projects by day and month. It is recorded as it happens, so that reports need not sum jobs and attempts."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Index, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Table


class UsageDay(Table):
    """Usage of a base model by a project on one day: the sum of the rows of all slots."""

    __tablename__ = "usage_days"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    day: Mapped[int] = mapped_column(Integer, primary_key=True)
    """Days since 1970-01-01 UTC."""
    base_model: Mapped[str] = mapped_column(primary_key=True)
    slot: Mapped[int] = mapped_column(Integer, primary_key=True)
    """Spreads concurrent writers over several rows, so that they don't wait for each other."""
    device_seconds: Mapped[float] = mapped_column(default=0.0)
    trained_tokens: Mapped[int] = mapped_column(default=0)
    """Trained tokens of the jobs that succeeded on this day."""
    num_created: Mapped[int] = mapped_column(default=0)
    num_succeeded: Mapped[int] = mapped_column(default=0)
    num_failed: Mapped[int] = mapped_column(default=0)
    num_cancelled: Mapped[int] = mapped_column(default=0)
    num_plans: Mapped[int] = mapped_column(default=0, server_default="0")
    num_completions: Mapped[int] = mapped_column(default=0, server_default="0")
    """This and the next two: inference requests that were answered on this day, and their tokens."""
    prompt_tokens: Mapped[int] = mapped_column(default=0, server_default="0")
    completion_tokens: Mapped[int] = mapped_column(default=0, server_default="0")
    __table_args__ = (Index(None, "day"),)


class UsageMonth(Table):
    """Device-seconds of a project in one month, for all base models: the sum of the rows of all slots."""

    __tablename__ = "usage_months"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    month: Mapped[int] = mapped_column(Integer, primary_key=True)
    """Months since year 0: 12 * year + month - 1, in UTC."""
    slot: Mapped[int] = mapped_column(Integer, primary_key=True)
    device_seconds: Mapped[float]


class StoredDay(Table):
    """Bytes that a project stored at the end of a day on which they changed. The latest row holds the current value."""

    __tablename__ = "stored_days"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    day: Mapped[int] = mapped_column(Integer, primary_key=True)
    num_bytes: Mapped[int]


class StoredBytes(Table):
    """Bytes that a project stores now; stored_bytes.py lists the parts."""

    __tablename__ = "stored_bytes"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    num_bytes: Mapped[int]


class ServiceCounter(Table):
    """A counter of the service: the sum of the rows of all slots. See catalog/usage/ledger.py."""

    __tablename__ = "tallies"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    label: Mapped[str] = mapped_column(String(64), primary_key=True)
    """Label value of the counter, such as an `EndReason`; empty for a counter without labels."""
    slot: Mapped[int] = mapped_column(Integer, primary_key=True)
    """Spreads concurrent writers over several rows, so that they don't wait for each other."""
    number: Mapped[int]
