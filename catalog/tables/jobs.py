"""Jobs, and the requests that made them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Boolean, ForeignKey, Index, Integer, String, false, text
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Json, Leased, Table

IN_QUEUE = text("queued_at IS NOT NULL")
WITH_DEADLINE = text("deadline IS NOT NULL AND finished_at IS NULL")
WITHOUT_METADATA = text("CAST(jobs.labels AS TEXT) IN ('null', '{}')")
without_metadata: dict[str, Any] = {"sqlite_where": text("CAST(labels AS TEXT) IN ('null', '{}')")}
without_metadata["postgresql_where"] = without_metadata["sqlite_where"]
"""Of an index of the jobs that have none: a query that is to use it says WITHOUT_METADATA."""
of_the_queue: dict[str, Any] = {"sqlite_where": IN_QUEUE, "postgresql_where": IN_QUEUE}
"""Of an index of the jobs in the queue alone: a query that is to use it says the same, and nothing of the state."""


class Job(Leased, Table):
    """It is leased to the worker that tokenizes its files, and later to the one that trains it."""

    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    created_at: Mapped[float]
    created_by: Mapped[str]
    state: Mapped[str]
    reason: Mapped[str | None]
    """EndReason of the last attempt that ended."""
    base_model: Mapped[str] = mapped_column(ForeignKey("base_models.name"))
    base_digest: Mapped[str]
    pack_key: Mapped[str]
    priority: Mapped[int] = mapped_column(Integer)
    requested: Mapped[Json]
    body_digest: Mapped[str | None]
    """Digest of the request as it was understood: tells a client's retry from a second job."""
    trace: Mapped[str | None] = mapped_column(String(64))
    """W3C traceparent of the request that made it: the parent of what is done for it. See tracing.py."""
    spec: Mapped[Json]
    parent_adapter: Mapped[str | None]
    """Id of the adapter that it continues, whose row is kept for ever; more of it is in the spec."""
    adapter_parameters: Mapped[int] = mapped_column(default=0)
    """Numbers that the adapter trains: what memory arithmetic starts from."""
    sweep_id: Mapped[str | None]
    """Of a trial; what it is a trial of is kept in `trials`."""
    suffix: Mapped[str | None]
    labels: Mapped[Json | None]
    """The wire's `metadata`."""
    tags: Mapped[list[Any] | None]
    training_file: Mapped[str] = mapped_column(ForeignKey("files.id"))
    validation_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    train_prepared: Mapped[str | None]
    """Key in `prepared`, once a worker has tokenized or refused the file."""
    valid_prepared: Mapped[str | None]
    num_steps: Mapped[int | None]
    longest_example: Mapped[int | None]
    """Tokens of the longest row of its files, as cut to max_length, or of the longest pair of rows."""
    own_bytes: Mapped[int | None]
    """This and the next three: memory requirements for the scheduler. catalog/resources/requirements.py computes them
    when the files are prepared."""
    saved_bytes: Mapped[int | None]
    trainer_bytes: Mapped[int | None]
    slice_bytes: Mapped[int | None]
    shardable_bytes: Mapped[int] = mapped_column(default=0, server_default="0")
    """Of what its trainer needs, what several devices can divide; and what each then needs beside its share."""
    gathered_bytes: Mapped[int] = mapped_column(default=0, server_default="0")
    least_bytes: Mapped[int] = mapped_column(default=0, server_default="0")
    """With a trainer to itself on a device that computes blocks again: where not even that fits, no look is taken.
    0: not reckoned yet."""
    least_divided_bytes: Mapped[int] = mapped_column(default=0, server_default="0")
    """The same of a device of a group that divides bases, however many there are in it. 0: not reckoned yet, and nor is
    what of its trainer they can divide."""
    queued_at: Mapped[float | None]
    """When it came into the queue, while it is there and not held: what its waiting is reckoned from."""
    place: Mapped[float] = mapped_column(default=0.0, server_default="0")
    """Among its project's jobs of its class; the lowest goes first. See catalog/lifecycle/queue_position.py."""
    is_held: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    """It waits and isn't chosen, until it is released."""
    deadline: Mapped[float | None]
    """When it should have ended. It is told where it can't; nothing ends it."""
    needed_start: Mapped[float | None]
    """When it must start for that, by what was known when its files were prepared."""
    is_late_announced: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    claimed_at: Mapped[float | None]
    """When it was last claimed to train."""
    charged_at: Mapped[float | None]
    """Until when its training is charged to its project."""
    device_seconds: Mapped[float] = mapped_column(default=0.0, server_default="0")
    """Charged so far, over all attempts: seconds of a device, divided among the jobs that trained on it together."""

    attempt: Mapped[int]
    counted_attempts: Mapped[int]
    """Attempts that ended badly since the last new checkpoint."""
    lost_attempts: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    """Attempts whose worker went away, since the last new checkpoint: they count towards no quarantine of three, but
    may be the job's doing."""
    lost_preparations: Mapped[int] = mapped_column(default=0)
    """Times that a worker went away while it prepared the files, or could not prepare them."""
    resumed_at: Mapped[float | None]
    """When it was last taken out of a pause: attempts before that say nothing against it."""
    worker_id: Mapped[str | None]
    trainer_id: Mapped[str | None]
    """Of the attempt that runs; of the last one, once the job is final."""
    lease_extended: Mapped[bool] = mapped_column(Boolean, default=False)
    """Recovery gave this lease its one extension after an outage; a heartbeat clears it."""
    run_after: Mapped[float | None]
    cancel_requested: Mapped[bool] = mapped_column(Boolean)
    pause_requested: Mapped[bool] = mapped_column(Boolean)
    preempted_for: Mapped[str | None]
    """Id of the urgent job, of whichever project, for which this one is asked to leave."""
    num_preemptions: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    """Times that it has left for others."""
    preemption_requested_at: Mapped[float | None]
    """When others were last asked to leave so that it can train."""

    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    trained_tokens: Mapped[int | None]
    progress: Mapped[Json | None]
    """The latest step, num_steps, loss, tokens_per_second, seconds_left and updated_at (their time). After the first
    evaluation also valid_loss (the latest) and best_valid_loss. At the end also Course and kept_valid_loss."""
    adapter_name: Mapped[str | None]
    result_file: Mapped[str | None]
    """Id of the file that holds its curves; the row of a file is kept for ever. None before the job has succeeded."""
    error: Mapped[Json | None]
    """code, message, param: as on the wire."""
    __table_args__ = (
        Index(None, "project_id", "created_at", "id"),
        Index("ix_jobs_heads", "state", "project_id", "priority", "is_held", "place", "id"),
        Index("ix_jobs_alike", "pack_key", "project_id", "priority", "place", "id", **of_the_queue),
        Index("ix_jobs_waiting", "priority", "queued_at", **of_the_queue),
        Index("ix_jobs_deadlines", "deadline", sqlite_where=WITH_DEADLINE, postgresql_where=WITH_DEADLINE),
        Index("ix_jobs_without_metadata", "project_id", "created_at", "id", **without_metadata),
        Index(None, "state", "lease_expires_at"),
        Index("ix_jobs_smallest", "project_id", "priority", "least_bytes", "id", **of_the_queue),
        Index("ix_jobs_smallest_alike", "pack_key", "project_id", "priority", "least_bytes", "id", **of_the_queue),
        Index("ix_jobs_smallest_divided", "project_id", "priority", "least_divided_bytes", "id", **of_the_queue),
        Index(
            "ix_jobs_smallest_divided_alike",
            *("pack_key", "project_id", "priority", "least_divided_bytes", "id"),
            **of_the_queue,
        ),
        Index(None, "created_by", "created_at"),
        Index(None, "training_file"),
        Index(None, "validation_file"),
        Index(None, "parent_adapter"),
        Index(None, "sweep_id", "state"),
    )


class JobLabel(Table):
    """A pair of a job's metadata, or one of its tags, by digest: what a list of jobs is chosen by."""

    __tablename__ = "job_labels"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    label: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str]
    """Of the job, as its `created_at`: so that a page is read from one index."""
    created_at: Mapped[float]
    __table_args__ = (Index(None, "project_id", "label", "created_at", "job_id"),)


class IdempotencyKey(Table):
    __tablename__ = "idempotency_keys"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    body_digest: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[float]
