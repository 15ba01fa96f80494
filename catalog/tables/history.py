"""What a job leaves behind: its attempts, events, curves and checkpoints."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Index, Integer, LargeBinary, String, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import AutoKey, Json, Leased, Table

NOT_METRICS, LIVE, ENDED = text("type <> 'metrics'"), text("ended_at IS NULL"), text("ended_at IS NOT NULL")
BLAMED = text("blamed_worker_id IS NOT NULL")


class Attempt(Table):
    """One claim of one job, from claim to end. Kept for ever: lineage reads it."""

    __tablename__ = "attempts"
    claim_id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    number: Mapped[int]
    worker_id: Mapped[str]
    trainer_id: Mapped[str | None]
    started_at: Mapped[float]
    ended_at: Mapped[float | None]
    reason: Mapped[str | None]
    detail: Mapped[str | None] = mapped_column(Text)
    blamed_worker_id: Mapped[str | None]
    """Whose doing a bad end may be. None: its worker's. Empty: of a gang nobody can tell whose."""
    resumed_from_step: Mapped[int | None]
    why: Mapped[Json | None]
    """The inputs of the decision that let it run."""
    preemption: Mapped[Json | None]
    """And of the one that asked it to leave for an urgent job, if one did."""
    __table_args__ = (
        Index(None, "trainer_id", "ended_at"),
        Index("ix_attempts_live", "worker_id", sqlite_where=LIVE, postgresql_where=LIVE),
        Index("ix_attempts_ended", "worker_id", "ended_at", sqlite_where=ENDED, postgresql_where=ENDED),
        Index("ix_attempts_blamed", "blamed_worker_id", "ended_at", sqlite_where=BLAMED, postgresql_where=BLAMED),
    )


class JobOutput(Table):
    """What one process of a trainer printed for one attempt: a stored text, bounded, without secrets."""

    __tablename__ = "job_outputs"
    claim_id: Mapped[str] = mapped_column(ForeignKey("attempts.claim_id"), primary_key=True)
    rank: Mapped[int] = mapped_column(Integer, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    attempt: Mapped[int]
    """Its number."""
    digest: Mapped[str]
    num_bytes: Mapped[int]
    written_at: Mapped[float]


class JobEvent(Table):
    """What a person reads, and the record of every transition (type `transition`, never deleted)."""

    __tablename__ = "events"
    seq: Mapped[int] = mapped_column(AutoKey, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[float]
    level: Mapped[str]
    type: Mapped[str]
    """message, metrics or transition. On the wire a transition is a message."""
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[Json | None]
    __table_args__ = (
        Index(None, "job_id", "seq"),
        # A long job has thousands of metrics between two messages.
        Index("ix_events_messages", "job_id", "seq", sqlite_where=NOT_METRICS, postgresql_where=NOT_METRICS),
    )


class MetricBlock(Table):
    """Some points of a curve that follow each other, as catalog/history/metric_points.py packs them."""

    __tablename__ = "metric_blocks"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(8), primary_key=True)
    """train or valid."""
    first_step: Mapped[int] = mapped_column(primary_key=True)
    last_step: Mapped[int]
    num_points: Mapped[int] = mapped_column(Integer)
    last_seq: Mapped[int]
    """Greatest of its points': who has seen that event has seen them all."""
    least_loss: Mapped[float]
    sketch: Mapped[bytes | None] = mapped_column(LargeBinary)
    """Of a full block, its ends and peaks in a few points: small columns stand before the large one."""
    outline: Mapped[bytes | None] = mapped_column(LargeBinary)
    """The same in some more."""
    points: Mapped[bytes] = mapped_column(LargeBinary)
    __table_args__ = (Index(None, "job_id", "last_seq"),)


class Checkpoint(Table):
    __tablename__ = "checkpoints"
    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    step: Mapped[int]
    artifact: Mapped[str | None] = mapped_column(ForeignKey("artifacts.digest"), index=True)
    """What a job goes on from. None once its files were dropped; the newest two are kept."""
    created_at: Mapped[float]
    name: Mapped[str | None] = mapped_column(index=True)
    """The wire's fine_tuned_model_checkpoint."""
    adapter: Mapped[str | None] = mapped_column(index=True)
    """Digest of the manifest of its weights in PEFT's layout. None where they were never written, or are dropped."""
    lineage: Mapped[Json | None]
    """The record of that adapter, and its id. They stay where a job continues it."""
    lineage_id: Mapped[str | None]
    __table_args__ = (Index(None, "job_id", "step", unique=True),)


IS_DUE = text("next_at IS NOT NULL")


class JobExport(Leased, Table):
    """One of a job's integrations, and how far it has got. It is leased to the worker that writes it."""

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
    """When it is due. None while the job does not train, and in the end."""
    num_failures: Mapped[int] = mapped_column(Integer, default=0)
    """Since something was last written."""
    error: Mapped[str | None] = mapped_column(Text)
    """What went wrong first: people were told."""
    finished_at: Mapped[float | None]
    __table_args__ = (Index("ix_job_exports_due", "next_at", sqlite_where=IS_DUE, postgresql_where=IS_DUE),)
