"""Jobs with their labels, sweeps, plans, and the idempotency keys of the requests that created jobs."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, Boolean, ForeignKey, Index, Integer, String, Text, false, text
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Json, Leased, Table

IN_QUEUE = text("queued_at IS NOT NULL")
WITH_DEADLINE = text("deadline IS NOT NULL AND finished_at IS NULL")
WITHOUT_METADATA = text("CAST(jobs.labels AS TEXT) IN ('null', '{}')")
without_metadata: dict[str, Any] = {"sqlite_where": text("CAST(labels AS TEXT) IN ('null', '{}')")}
without_metadata["postgresql_where"] = without_metadata["sqlite_where"]
"""Condition of a partial index of the jobs without metadata. A query must contain WITHOUT_METADATA to use the index."""
of_the_queue: dict[str, Any] = {"sqlite_where": IN_QUEUE, "postgresql_where": IN_QUEUE}
"""Condition of partial indexes of the queued jobs. A query must contain IN_QUEUE, and no condition on the state, to use
them."""
IS_DUE = text("due_at IS NOT NULL")


class Job(Leased, Table):
    """A job. It is leased to the worker that trains it. Before, its files are tokenized by a background task."""

    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    created_at: Mapped[float]
    created_by: Mapped[str]
    state: Mapped[str]
    reason: Mapped[str | None]
    """`EndReason` of the last attempt that ended."""
    base_model: Mapped[str] = mapped_column(ForeignKey("base_models.name"))
    base_digest: Mapped[str]
    pack_key: Mapped[str]
    priority: Mapped[int] = mapped_column(Integer)
    requested: Mapped[Json]
    body_digest: Mapped[str | None]
    """Digest of the parsed request. It distinguishes a client's retry from a second job."""
    trace: Mapped[str | None] = mapped_column(String(64))
    """W3C traceparent of the request that created it: the parent span of all work for the job. See tracing.py."""
    spec: Mapped[Json]
    parent_adapter: Mapped[str | None]
    """Id of the adapter that the job continues. The row of an adapter is never deleted; the spec has more about it."""
    adapter_parameters: Mapped[int] = mapped_column(default=0)
    """Number of trained parameters: the input of the memory estimates."""
    reproduces: Mapped[Json | None]
    """For a job that trains an adapter again: the id, name, lineage id and digests of that adapter. Workers can't
    change it."""
    reproduction: Mapped[Json | None]
    """The comparison with that adapter, once the job has succeeded. See catalog/registry/lineage_comparison.py."""
    sweep_id: Mapped[str | None]
    """The sweep of which the job is a trial. The `trials` table has its number and parameters."""
    suffix: Mapped[str | None]
    labels: Mapped[Json | None]
    """`metadata` in the API."""
    tags: Mapped[list[Any] | None]
    training_file: Mapped[str] = mapped_column(ForeignKey("files.id"))
    validation_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    train_prepared: Mapped[str]
    """Key in `prepared`. The row exists once a worker has tokenized or rejected the file."""
    valid_prepared: Mapped[str | None]
    num_steps: Mapped[int | None]
    longest_example: Mapped[int | None]
    """Tokens of the longest row of its files, truncated to max_length, or of the longest pair of rows."""
    own_bytes: Mapped[int | None]
    """This and the next three: memory requirements for the scheduler. catalog/resources/requirements.py computes them
    when the files are prepared."""
    saved_bytes: Mapped[int | None]
    trainer_bytes: Mapped[int | None]
    slice_bytes: Mapped[int | None]
    shardable_bytes: Mapped[int] = mapped_column(default=0, server_default="0")
    """This and the next: the part of `trainer_bytes` that can be sharded across devices, and the additional bytes that
    each device then needs for gathered blocks."""
    gathered_bytes: Mapped[int] = mapped_column(default=0, server_default="0")
    least_bytes: Mapped[int] = mapped_column(default=0, server_default="0")
    """Bytes that the job needs alone in a trainer with activation recomputation. A worker with less memory skips the
    job. 0: not calculated yet."""
    least_divided_bytes: Mapped[int] = mapped_column(default=0, server_default="0")
    """Lower bound of `least_bytes` for each device of a group that shards the base model, for any number of devices.
    0: neither this nor `shardable_bytes` is calculated yet."""
    queued_at: Mapped[float | None]
    """When it entered the queue, which is the start of its waiting time. None while it is held or not in the queue."""
    place: Mapped[float] = mapped_column(default=0.0, server_default="0")
    """Sort key among the project's jobs of the same class; the lowest is first. See
    catalog/lifecycle/queue_position.py."""
    is_held: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    """Whether the job is held: the scheduler does not choose it until it is released."""
    deadline: Mapped[float | None]
    """When the job should be finished. An event reports that it will be late; the job keeps running."""
    needed_start: Mapped[float | None]
    """Latest start that meets the deadline, as estimated when the files were prepared."""
    is_late_announced: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    claimed_at: Mapped[float | None]
    """When a worker last claimed it for training."""
    charged_at: Mapped[float | None]
    """Until when its training has been charged to its project."""
    device_seconds: Mapped[float] = mapped_column(default=0.0, server_default="0")
    """Device-seconds charged so far, over all attempts. Jobs of one trainer split its device-seconds equally."""

    attempt: Mapped[int]
    counted_attempts: Mapped[int]
    """Failed attempts that count against the job since the last new checkpoint."""
    lost_attempts: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    """Attempts whose worker was lost since the last new checkpoint. They don't count as `counted_attempts`, although
    the job may be the cause."""
    resumed_at: Mapped[float | None]
    """When it was last resumed after a pause. Earlier attempts do not count against the job."""
    worker_id: Mapped[str | None]
    trainer_id: Mapped[str | None]
    """This and `worker_id`: of the current attempt, or of the last one once the job is final."""
    lease_extended: Mapped[bool] = mapped_column(Boolean, default=False)
    """Whether recovery has given this lease its one extension after an outage. A heartbeat clears it."""
    run_after: Mapped[float | None]
    cancel_requested: Mapped[bool] = mapped_column(Boolean)
    pause_requested: Mapped[bool] = mapped_column(Boolean)
    preempted_for: Mapped[str | None]
    """Id of the urgent job, of any project, for which this job is being preempted."""
    num_preemptions: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    """Times that the job was preempted."""
    preemption_requested_at: Mapped[float | None]
    """When other jobs were last preempted for this job."""

    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    trained_tokens: Mapped[int | None]
    progress: Mapped[Json | None]
    """The latest step, num_steps, loss, tokens_per_second, seconds_left, and their time, updated_at. After the first
    evaluation also the latest valid_loss and best_valid_loss. At the end also Course and kept_valid_loss."""
    adapter_name: Mapped[str | None]
    result_file: Mapped[str | None]
    """Id of the file with its curves. None until the job has succeeded. The row of a file is never deleted."""
    error: Mapped[Json | None]
    """code, message, param: as in the API."""
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
    """A metadata pair or a tag of a job, as a digest. Lists of jobs are filtered by it."""

    __tablename__ = "job_labels"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    label: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str]
    """This and `created_at` repeat the values of the job, so that a page is read from one index."""
    created_at: Mapped[float]
    __table_args__ = (Index(None, "project_id", "label", "created_at", "job_id"),)


class IdempotencyKey(Table):
    __tablename__ = "idempotency_keys"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    body_digest: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[float]


class Sweep(Table):
    """Several jobs that were submitted as one. Like its jobs, it is never deleted."""

    __tablename__ = "sweeps"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    created_at: Mapped[float]
    created_by: Mapped[str]
    idempotency_key: Mapped[str | None]
    body_digest: Mapped[str]
    requested: Mapped[Json]
    """The request as it was received."""
    seed: Mapped[int]
    num_trials: Mapped[int]
    max_concurrent: Mapped[int | None]
    """Maximum number of unfinished trials; None: no limit."""
    rungs: Mapped[Json | None]
    """min_steps and reduction_factor; None: no trial is stopped."""
    training_file: Mapped[str] = mapped_column(ForeignKey("files.id"))
    validation_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    state: Mapped[str] = mapped_column(String(16))
    """A `catalog.spec.sweep.SweepState`."""
    num_created: Mapped[int]
    """Trials that exist: they have the numbers from 0 to num_created - 1."""
    is_closed: Mapped[bool] = mapped_column(Boolean)
    """Whether the sweep creates no further trials."""
    cancel_requested: Mapped[bool] = mapped_column(Boolean)
    due_at: Mapped[float | None]
    """When the controller next has work for the sweep. None: not before one of its trials finishes."""
    finished_at: Mapped[float | None]
    best_job: Mapped[str | None]
    """Job id of the best trial, whose adapter is the result of the sweep. Set once the sweep is final."""
    error: Mapped[Json | None]
    """code and message: why no further trial could be created."""
    __table_args__ = (
        Index(None, "project_id", "created_at", "id"),
        Index(None, "project_id", "idempotency_key", unique=True),
        Index(None, "created_by", "created_at"),
        Index(None, "finished_at"),
        Index("ix_sweeps_due", "due_at", sqlite_where=IS_DUE, postgresql_where=IS_DUE),
    )


class Trial(Table):
    """A job of a sweep."""

    __tablename__ = "trials"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    sweep_id: Mapped[str] = mapped_column(ForeignKey("sweeps.id"))
    number: Mapped[int]
    parameters: Mapped[Json]
    score: Mapped[float]
    """Current value of the objective, with the sign that makes lower better; infinite before the first value."""
    step: Mapped[int | None]
    """The step at which `score` was measured."""
    recent: Mapped[Json | None]
    """For an objective measured in training: the last values, with their steps."""
    reached_step: Mapped[int | None]
    """The step at which the trial reached a rung where the controller has not judged it yet."""
    reached_score: Mapped[float | None]
    """The score at that step."""
    pruner_state: Mapped[Json | None]
    """Attributes of the trial in Optuna's pruner: its score at each rung where it was judged."""
    stopped: Mapped[str | None] = mapped_column(Text)
    """A sentence that explains why the trial was stopped before its last step."""
    __table_args__ = (
        Index(None, "sweep_id", "number", unique=True),
        Index(None, "sweep_id", "score", "number"),
    )

    @property
    def rung(self) -> int | None:
        """The last rung that the trial reached."""
        num_rungs = len(self.pruner_state or {}) + (self.reached_step is not None)
        return num_rungs - 1 if num_rungs else None


class Plan(Table):
    """A dry run of a job. A worker computes it, and it is deleted once it has expired."""

    __tablename__ = "plans"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    created_at: Mapped[float]
    created_by: Mapped[str]
    expires_at: Mapped[float]
    state: Mapped[str]
    """computing, ready or failed."""
    base_model: Mapped[str] = mapped_column(ForeignKey("base_models.name"))
    base_digest: Mapped[str]
    requested: Mapped[Json]
    """The request as for a job: only the fields that it contained."""
    spec: Mapped[Json]
    training_file: Mapped[str] = mapped_column(ForeignKey("files.id"))
    validation_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    train_prepared: Mapped[str]
    """This and the next: keys in `prepared`, known before the files are prepared."""
    valid_prepared: Mapped[str | None]
    found: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """The result, once the plan is ready."""
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """code, message, param: why no job can train on these files."""
    __table_args__ = (
        Index(None, "project_id", "created_at", "id"),
        Index(None, "state", "created_at"),
        Index(None, "expires_at"),
    )


class FileOverlap(Table):
    """The number of rows of a prepared validation file that are also in a prepared training file."""

    __tablename__ = "file_overlaps"
    train_key: Mapped[str] = mapped_column(primary_key=True)
    valid_key: Mapped[str] = mapped_column(primary_key=True)
    num_rows: Mapped[int]
    """Rows of the validation file that are also in the training file."""
    of_rows: Mapped[int]
    """All rows of the validation file."""
