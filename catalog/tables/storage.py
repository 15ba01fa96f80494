"""What is stored in files: uploads, base models, artifacts, the tokens of a data file, adapters."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ForeignKey, Index, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Json, Leased, Table

EXPIRING = text("expires_at IS NOT NULL")
DELETED = text("deleted_at IS NOT NULL")


class File(Table):
    __tablename__ = "files"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    purpose: Mapped[str]
    filename: Mapped[str]
    num_bytes: Mapped[int]
    num_rows: Mapped[int | None]
    """Rows of a data set; None for files that hold none."""
    kind: Mapped[str | None]
    """What its rows are, a `row_kinds.DataKind`; None where there are none, and for chats of before it was kept."""
    digest: Mapped[str]
    """sha256 of the content, which is a blob of the artifact store."""
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    """From then on it is gone, once no unfinished job reads it; None: it stays until somebody deletes it."""
    deleted_at: Mapped[float | None]
    __table_args__ = (
        Index(None, "project_id", "created_at", "id"),
        Index(None, "project_id", "digest"),
        Index("ix_files_expiring", "expires_at", sqlite_where=EXPIRING, postgresql_where=EXPIRING),
        Index("ix_files_deleted", "project_id", "deleted_at", sqlite_where=DELETED, postgresql_where=DELETED),
    )


class BaseModelRow(Leased, Table):
    """A base model by name. The directory of its files is imported once per digest and node. It is leased to the worker
    that imports it first."""

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
    project_id: Mapped[str | None] = mapped_column(ForeignKey("projects.id"))
    """The project that owns the cache and is charged for it. None: written by a worker of a version that shared
    caches; no new job uses it, and cleaning deletes it."""
    file_digest: Mapped[str] = mapped_column(index=True)
    artifact: Mapped[str | None] = mapped_column(ForeignKey("artifacts.digest"), index=True)
    """None where the cache was evicted, and where the file can't be trained on: `report["refusal"]` says why."""
    num_bytes: Mapped[int] = mapped_column(default=0, server_default="0")
    """Size of the artifact, also after its eviction."""
    evicted_at: Mapped[float | None]
    report: Mapped[Json]
    details: Mapped[Json | None]
    """Sample rows and the lines of odd ones, which hold the data itself: for plans, and nobody who may not read the
    file. None of files that were prepared before there were plans."""
    created_at: Mapped[float]
    __table_args__ = (Index(None, "project_id", "file_digest"),)


class Adapter(Table):
    __tablename__ = "adapters"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    """ft:BASE:PROJECT:SUFFIX:ID, the wire's fine_tuned_model."""
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), unique=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    base_model: Mapped[str]
    base_digest: Mapped[str]
    artifact: Mapped[str] = mapped_column(index=True)
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


COUNTED = text("(part_bytes > 0 OR (file_id IS NULL AND cancelled_at IS NULL))")
"""Uploads that count against what a project may have open: a query that is to use their index says the same."""
of_the_counted: dict[str, Any] = {"sqlite_where": COUNTED, "postgresql_where": COUNTED}


class Upload(Table):
    """A file that was announced. Its row goes a day after its hour, whatever became of it."""

    __tablename__ = "uploads"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    purpose: Mapped[str]
    filename: Mapped[str]
    num_bytes: Mapped[int]
    """That were announced: its parts must hold so many."""
    part_bytes: Mapped[int] = mapped_column(server_default="0")
    """Bytes of its parts that lie in the store, without those of a part that is the whole file."""
    lifetime_seconds: Mapped[int | None]
    """Of the file; None: it stays until it is deleted."""
    file_id: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    """The file that its parts became."""
    created_at: Mapped[float]
    expires_at: Mapped[float]
    cancelled_at: Mapped[float | None]
    completing_until: Mapped[float | None]
    """Lease of who joins its parts."""
    num_completions: Mapped[int] = mapped_column(server_default="0")
    """That were begun and did not fail by the service's own fault."""
    __table_args__ = (Index("ix_uploads_counted", "project_id", **of_the_counted),)


class UploadPart(Table):
    """The same bytes twice are one part."""

    __tablename__ = "upload_parts"
    id: Mapped[str] = mapped_column(primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"))
    num_bytes: Mapped[int]
    digest: Mapped[str]
    """sha256 of the content, which is a blob of the artifact store."""
    created_at: Mapped[float]
    __table_args__ = (Index(None, "upload_id", "digest", unique=True),)
