"""Every table. Times are seconds since 1970 by the database's clock; ids are text made by `new_id`.

Migrations under migrations/ must agree with this file: `alembic check` says so in CI.
"""

from __future__ import annotations

import secrets
from typing import Any

from sqlalchemy import JSON, BigInteger, Boolean, Float, ForeignKey, Index, Integer, MetaData, String, Text, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}
Json = dict[str, Any]
AutoKey = BigInteger().with_variant(Integer, "sqlite")
"""SQLite numbers rows by itself only for a column of type INTEGER."""
NOT_METRICS = text("type <> 'metrics'")


def new_id(prefix: str) -> str:
    """An unguessable id such as `ftjob-3fJ0…`: 96 random bits."""
    return f"{prefix}-{secrets.token_hex(12)}"


class Table(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {dict[str, Any]: JSON, list[Any]: JSON, float: Float(53), int: BigInteger, str: String(255)}


class Project(Table):
    __tablename__ = "projects"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[float]


class ApiKey(Table):
    """Only an HMAC of the key is kept."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str]
    digest: Mapped[str] = mapped_column(unique=True)
    is_operator: Mapped[bool] = mapped_column(Boolean)
    """May add base models and see every worker; all other rights end at the project."""
    created_at: Mapped[float]
    last_used_at: Mapped[float | None]
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]


class SignIn(Table):
    """A one-time sign-in link, then the browser session that it was exchanged for. Digests only."""

    __tablename__ = "sign_ins"
    id: Mapped[str] = mapped_column(primary_key=True)
    api_key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"))
    link_digest: Mapped[str | None] = mapped_column(unique=True)
    """None once it was used."""
    browser_digest: Mapped[str | None] = mapped_column(unique=True)
    created_at: Mapped[float]
    expires_at: Mapped[float]


class File(Table):
    __tablename__ = "files"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    purpose: Mapped[str]
    filename: Mapped[str]
    num_bytes: Mapped[int]
    num_rows: Mapped[int | None]
    """Rows of a data set; None for result files."""
    kind: Mapped[str | None]
    """What its rows are, a `row_kinds.DataKind`; None where there are none, and for chats of before it was kept."""
    digest: Mapped[str]
    """sha256 of the content, which is a blob of the artifact store."""
    created_at: Mapped[float]
    deleted_at: Mapped[float | None]
    __table_args__ = (Index(None, "project_id", "created_at", "id"),)


class BaseModelRow(Table):
    """A base model by name. The directory of its files is imported once per digest and node."""

    __tablename__ = "base_models"
    name: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    """hub, folder or gguf."""
    source: Mapped[str] = mapped_column(Text)
    revision: Mapped[str | None]
    state: Mapped[str]
    """importing, ready, failed, or deleted: then the row only keeps the name for the jobs that were trained on it."""
    digest: Mapped[str | None]
    """Digest of the manifest of its files: two names with one digest are one base."""
    manifest: Mapped[Json | None]
    description: Mapped[Json | None]
    """What lora_core.describe_base said: architecture, parameters, shapes."""
    error: Mapped[Json | None]
    created_at: Mapped[float]
    importing_until: Mapped[float | None]
    """Lease of the worker that imports it."""


class Job(Table):
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
    spec: Mapped[Json]
    parent_adapter: Mapped[str | None]
    """Id of the adapter that it continues, whose row is kept for ever; more of it is in the spec."""
    adapter_parameters: Mapped[int] = mapped_column(default=0)
    """Numbers that the adapter trains: what memory arithmetic starts from."""
    suffix: Mapped[str | None]
    labels: Mapped[Json | None]
    """The wire's `metadata`."""
    training_file: Mapped[str] = mapped_column(ForeignKey("files.id"))
    validation_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    train_prepared: Mapped[str | None]
    """Key in `prepared`, once a worker has tokenised or refused the file."""
    valid_prepared: Mapped[str | None]
    num_steps: Mapped[int | None]
    longest_example: Mapped[int | None]
    """Tokens of the longest row of its files, as cut to max_length, or of the longest pair of rows."""

    attempt: Mapped[int]
    counted_attempts: Mapped[int]
    """Attempts that ended badly since the last new checkpoint."""
    lost_preparations: Mapped[int] = mapped_column(default=0)
    """Times that a worker went away while it prepared the files."""
    claim_id: Mapped[str | None] = mapped_column(unique=True)
    """The fencing token, of training or of preparing. Whoever does not hold it writes nothing."""
    worker_id: Mapped[str | None]
    trainer_id: Mapped[str | None]
    """Of the attempt that runs; of the last one, once the job is final."""
    lease_expires_at: Mapped[float | None]
    lease_extended: Mapped[bool] = mapped_column(Boolean, default=False)
    """Recovery gave this lease its one extension after an outage; a heartbeat clears it."""
    run_after: Mapped[float | None]
    cancel_requested: Mapped[bool] = mapped_column(Boolean)
    pause_requested: Mapped[bool] = mapped_column(Boolean)

    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    trained_tokens: Mapped[int | None]
    progress: Mapped[Json | None]
    """Latest of: step, num_steps, loss, tokens_per_second, seconds_left; and of the evaluations on held-out data
    valid_loss (the latest) and best_valid_loss, once there was one; at the end those of Course, and kept_valid_loss."""
    adapter_name: Mapped[str | None]
    error: Mapped[Json | None]
    """code, message, param: as on the wire."""
    __table_args__ = (
        Index(None, "project_id", "created_at", "id"),
        Index(None, "state", "priority", "created_at"),
        Index(None, "state", "lease_expires_at"),
        Index(None, "created_by", "created_at"),
        Index(None, "training_file"),
        Index(None, "validation_file"),
        Index(None, "parent_adapter"),
    )


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
    resumed_from_step: Mapped[int | None]
    why: Mapped[Json | None]
    """The inputs of the decision that let it run."""


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
    """What it said at start and end: dtype, device, determinism class, versions, memory, exit."""


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


class Metric(Table):
    """One point of a curve. A replayed step (after a resume) overwrites its point."""

    __tablename__ = "metrics"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(8), primary_key=True)
    """train or valid."""
    step: Mapped[int] = mapped_column(primary_key=True)
    created_at: Mapped[float]
    loss: Mapped[float]
    token_accuracy: Mapped[float | None]
    learning_rate: Mapped[float | None]
    grad_norm: Mapped[float | None]
    num_tokens: Mapped[int | None]
    rewards: Mapped[Json | None]
    """Of a job that learns from pairs: chosen, rejected, margin, accuracy."""


class Checkpoint(Table):
    __tablename__ = "checkpoints"
    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    step: Mapped[int]
    artifact: Mapped[str | None] = mapped_column(ForeignKey("artifacts.digest"))
    """None once its files were dropped; the newest two are kept."""
    metrics: Mapped[Json]
    created_at: Mapped[float]
    __table_args__ = (Index(None, "job_id", "step", unique=True),)


class Artifact(Table):
    """A manifest: named files, each a content-addressed blob. It is visible once this row is."""

    __tablename__ = "artifacts"
    digest: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    """adapter, checkpoint or tokens."""
    files: Mapped[list[Any]]
    """[{"path", "digest", "num_bytes"}], sorted by path."""
    num_bytes: Mapped[int]
    created_at: Mapped[float]


class Prepared(Table):
    """The token cache of one data file for one tokenizer, template and length."""

    __tablename__ = "prepared"
    key: Mapped[str] = mapped_column(primary_key=True)
    file_digest: Mapped[str] = mapped_column(index=True)
    artifact: Mapped[str | None] = mapped_column(ForeignKey("artifacts.digest"))
    """None where the file can't be trained on: `report["refusal"]` says why."""
    report: Mapped[Json]
    created_at: Mapped[float]


class Adapter(Table):
    __tablename__ = "adapters"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    """ft:BASE:PROJECT:SUFFIX:ID, the wire's fine_tuned_model."""
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), unique=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    base_model: Mapped[str]
    base_digest: Mapped[str]
    artifact: Mapped[str]
    """Digest of its manifest. The row in `artifacts` goes some time after the adapter was deleted."""
    num_parameters: Mapped[int]
    verification: Mapped[Json]
    evaluation: Mapped[Json | None]
    """base_loss, loss, and the perplexities, on the validation file."""
    lineage: Mapped[Json]
    lineage_id: Mapped[str]
    created_at: Mapped[float]
    deleted_at: Mapped[float | None]
    __table_args__ = (Index(None, "project_id", "created_at", "id"),)


class Worker(Table):
    __tablename__ = "workers"
    id: Mapped[str] = mapped_column(primary_key=True)
    host: Mapped[str]
    pid: Mapped[int]
    devices: Mapped[list[Any]]
    version: Mapped[str]
    memory_bytes: Mapped[int]
    started_at: Mapped[float]
    heartbeat_at: Mapped[float]
    ended_at: Mapped[float | None]
    drain_requested: Mapped[bool] = mapped_column(Boolean)
    resident_base: Mapped[str | None]
    trainer_id: Mapped[str | None]
    report: Mapped[Json | None]
    """Tokens a second, memory in use, versions."""

    @property
    def is_leaving(self) -> bool:
        """It gets nothing new."""
        return self.drain_requested or self.ended_at is not None


class Pulse(Table):
    """One row: when the database was last seen to answer. A gap in it is an outage."""

    __tablename__ = "pulse"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    seen_at: Mapped[float]


class IdempotencyKey(Table):
    __tablename__ = "idempotency_keys"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    body_digest: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[float]
