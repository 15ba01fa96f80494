"""Jobs' curves on their way to trackers."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Index, Integer, String, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Table

IS_DUE = text("next_at IS NOT NULL")


class JobExport(Table):
    """One of a job's integrations, and how far it has got."""

    __tablename__ = "job_exports"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    type: Mapped[str] = mapped_column(String(32), primary_key=True)
    """An `integrations.IntegrationType`."""
    run_id: Mapped[str | None]
    """The tracker's; the same for all attempts of the job."""
    train_step: Mapped[int] = mapped_column(default=-1)
    valid_step: Mapped[int] = mapped_column(default=-1)
    """Of both: the last step of the curve that was written there."""
    next_at: Mapped[float | None]
    """When it is due; while a worker writes it, when its claim runs out. None while the job does not train, and in the
    end."""
    claim_id: Mapped[str | None]
    num_failures: Mapped[int] = mapped_column(Integer, default=0)
    """Since something was last written."""
    error: Mapped[str | None] = mapped_column(Text)
    """What went wrong first: people were told."""
    finished_at: Mapped[float | None]
    __table_args__ = (Index("ix_job_exports_due", "next_at", sqlite_where=IS_DUE, postgresql_where=IS_DUE),)
