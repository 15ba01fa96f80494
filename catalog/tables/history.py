"""The history of a job: attempts, output, events, curves, checkpoints and runs in trackers."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Index, Integer, LargeBinary, String, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import AutoKey, Json, Table

NOT_METRICS, LIVE, ENDED = text("type <> 'metrics'"), text("ended_at IS NULL"), text("ended_at IS NOT NULL")
BLAMED = text("blamed_worker_id IS NOT NULL")


class Attempt(Table):
    """One claim of one job, from claim to end. It is never deleted, because lineage reads it."""

    __tablename__ = "attempts"
    claim_id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    number: Mapped[int]
    worker_id: Mapped[str]
    trainer_id: Mapped[str]
    started_at: Mapped[float]
    ended_at: Mapped[float | None]
    reason: Mapped[str | None]
    detail: Mapped[str | None] = mapped_column(Text)
    blamed_worker_id: Mapped[str | None]
    """The worker that a failure is attributed to. None: `worker_id`. Empty: no single gang member."""
    resumed_from_step: Mapped[int | None]
    why: Mapped[Json]
    """The inputs of the scheduling decision that started it."""
    preemption: Mapped[Json | None]
    """The inputs of the decision that preempted it for an urgent job, if one did."""
    __table_args__ = (
        Index(None, "trainer_id", "ended_at"),
        Index("ix_attempts_live", "worker_id", sqlite_where=LIVE, postgresql_where=LIVE),
        Index("ix_attempts_ended", "worker_id", "ended_at", sqlite_where=ENDED, postgresql_where=ENDED),
        Index("ix_attempts_blamed", "blamed_worker_id", "ended_at", sqlite_where=BLAMED, postgresql_where=BLAMED),
    )


class JobOutput(Table):
    """The output of one trainer process for one attempt: a stored text of limited length, with secrets removed."""

    __tablename__ = "job_outputs"
    claim_id: Mapped[str] = mapped_column(ForeignKey("attempts.claim_id"), primary_key=True)
    rank: Mapped[int] = mapped_column(Integer, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    attempt: Mapped[int]
    """Number of the attempt."""
    digest: Mapped[str]
    num_bytes: Mapped[int]
    written_at: Mapped[float]


class JobEvent(Table):
    """A message for users, or a state transition (type `transition`, never deleted)."""

    __tablename__ = "events"
    seq: Mapped[int] = mapped_column(AutoKey, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[float]
    level: Mapped[str]
    type: Mapped[str]
    """message, metrics or transition. The API shows a transition as a message."""
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[Json | None]
    __table_args__ = (
        Index(None, "job_id", "seq"),
        # A long job can have thousands of metrics between two messages.
        Index("ix_events_messages", "job_id", "seq", sqlite_where=NOT_METRICS, postgresql_where=NOT_METRICS),
    )


class MetricBlock(Table):
    """Consecutive points of a curve, packed by catalog/history/metric_points.py."""

    __tablename__ = "metric_blocks"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(8), primary_key=True)
    """train or valid."""
    first_step: Mapped[int] = mapped_column(primary_key=True)
    last_step: Mapped[int]
    num_points: Mapped[int] = mapped_column(Integer)
    last_seq: Mapped[int]
    """The greatest `seq` of its points. A reader that has seen this event has seen all of them."""
    least_loss: Mapped[float]
    sketch: Mapped[bytes | None] = mapped_column(LargeBinary)
    """The ends and peaks of a full block in a few points. Small columns come before the large `points`."""
    outline: Mapped[bytes | None] = mapped_column(LargeBinary)
    """The ends and peaks in more points than `sketch`."""
    points: Mapped[bytes] = mapped_column(LargeBinary)
    __table_args__ = (Index(None, "job_id", "last_seq"),)


class Checkpoint(Table):
    __tablename__ = "checkpoints"
    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    step: Mapped[int]
    artifact: Mapped[str | None] = mapped_column(ForeignKey("artifacts.digest"), index=True)
    """The state that a job resumes from. None once its files are deleted; the newest two checkpoints are kept."""
    created_at: Mapped[float]
    name: Mapped[str] = mapped_column(index=True)
    """`fine_tuned_model_checkpoint` in the API."""
    adapter: Mapped[str | None] = mapped_column(index=True)
    """Digest of the manifest of its weights in PEFT's layout. None: they were never written, or are deleted."""
    lineage: Mapped[Json | None]
    """Lineage record of that adapter, and its id. Both are kept if a job continues the adapter."""
    lineage_id: Mapped[str | None]
    __table_args__ = (Index(None, "job_id", "step", unique=True),)


class TrackerRunRow(Table):
    """The run of a job in a tracker: how far its curves are written."""

    __tablename__ = "tracker_runs"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    type: Mapped[str] = mapped_column(String(32), primary_key=True)
    """An `integrations.IntegrationType`."""
    run_id: Mapped[str | None]
    """Id of the run in the tracker; all attempts of the job share it."""
    train_step: Mapped[int] = mapped_column(default=-1)
    valid_step: Mapped[int] = mapped_column(default=-1)
    """This and `train_step`: the last step of the curve that was written to the tracker."""
    error: Mapped[str | None] = mapped_column(Text)
    """The first problem. Once it is set, a further failure that will be retried adds no event."""
    finished_at: Mapped[float | None]
