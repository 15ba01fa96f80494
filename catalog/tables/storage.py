"""Stored files: data files, uploads, base models, artifacts, token caches, adapters and their exports."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, ForeignKey, Index, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Json, Table

EXPIRING = text("expires_at IS NOT NULL")
DELETED = text("deleted_at IS NOT NULL")
UNFINISHED_EXPORTS = ("queued", "running")
"""The states of an export on which a worker works, or will work."""


class File(Table):
    __tablename__ = "files"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    purpose: Mapped[str]
    filename: Mapped[str]
    num_bytes: Mapped[int]
    num_rows: Mapped[int | None]
    """Rows of a dataset. None for files without rows."""
    kind: Mapped[str | None]
    """The `DataKind` of its rows. None for files without rows."""
    digest: Mapped[str]
    """sha256 of the content, which is a blob of the artifact store."""
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    """The file is deleted after this time, once no unfinished job reads it. None: kept until a user deletes it."""
    deleted_at: Mapped[float | None]
    __table_args__ = (
        Index(None, "project_id", "created_at", "id"),
        Index(None, "project_id", "digest"),
        Index("ix_files_expiring", "expires_at", sqlite_where=EXPIRING, postgresql_where=EXPIRING),
        Index("ix_files_deleted", "project_id", "deleted_at", sqlite_where=DELETED, postgresql_where=DELETED),
    )


class BaseModelRow(Table):
    """A base model by name. Its files are imported once per digest and node."""

    __tablename__ = "base_models"
    name: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    """hub, folder or gguf."""
    source: Mapped[str] = mapped_column(Text)
    revision: Mapped[str | None]
    chat_template: Mapped[str | None] = mapped_column(Text)
    """Text of the template that replaces those of the source. None: the source's own."""
    state: Mapped[str]
    """importing, ready, failed or deleted. A deleted row keeps the name for the jobs that were trained on the model."""
    digest: Mapped[str | None]
    """Digest of the manifest of its files. Two names with the same digest are the same base model."""
    manifest: Mapped[Json | None]
    description: Mapped[Json | None]
    """The result of lora_core.describe_base: architecture, parameters, shapes."""
    error: Mapped[Json | None]
    created_at: Mapped[float]


class Artifact(Table):
    """A manifest: named files, each a content-addressed blob. An artifact exists once its row is committed."""

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
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    """The project that owns the cache and is charged for it."""
    file_digest: Mapped[str] = mapped_column(index=True)
    artifact: Mapped[str | None] = mapped_column(ForeignKey("artifacts.digest"), index=True)
    """None: the cache was evicted, or the file can't be trained on. `report["refusal"]` then has the reason."""
    num_bytes: Mapped[int] = mapped_column(default=0, server_default="0")
    """Size of the artifact, also after its eviction."""
    evicted_at: Mapped[float | None]
    report: Mapped[Json]
    details: Mapped[Json]
    """Sample rows, and line numbers of unusual rows, for plans. They contain the data itself: show them only to callers
    that may read the file."""
    created_at: Mapped[float]
    __table_args__ = (Index(None, "project_id", "file_digest"),)


class Adapter(Table):
    __tablename__ = "adapters"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    """ft:BASE:PROJECT:SUFFIX:ID; `fine_tuned_model` in the API."""
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), unique=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    base_model: Mapped[str]
    base_digest: Mapped[str]
    artifact: Mapped[str] = mapped_column(index=True)
    """Digest of its manifest. Cleanup deletes the row in `artifacts` some time after the adapter is deleted."""
    num_parameters: Mapped[int]
    verification: Mapped[Json]
    evaluation: Mapped[Json | None]
    """base_loss, loss and the perplexities on the validation file."""
    lineage: Mapped[Json]
    lineage_id: Mapped[str]
    created_at: Mapped[float]
    deleted_at: Mapped[float | None]
    __table_args__ = (Index(None, "project_id", "created_at", "id"),)


COUNTED = text("(part_bytes > 0 OR (file_id IS NULL AND cancelled_at IS NULL))")
"""Uploads that count toward the open-upload limits of a project. A query must repeat this condition to use the index
`ix_uploads_counted`."""
of_the_counted: dict[str, Any] = {"sqlite_where": COUNTED, "postgresql_where": COUNTED}


class Upload(Table):
    """An upload in parts. It expires an hour after its creation; its row is deleted a day later in any state."""

    __tablename__ = "uploads"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    purpose: Mapped[str]
    filename: Mapped[str]
    num_bytes: Mapped[int]
    """Size of the file as announced. The parts must have exactly this size in total."""
    part_bytes: Mapped[int] = mapped_column(server_default="0")
    """Bytes of its parts in the store, except those of a part that is the whole file."""
    lifetime_seconds: Mapped[int | None]
    """Lifetime of the completed file. None: it is kept until it is deleted."""
    file_id: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    """The file that was assembled from the parts."""
    created_at: Mapped[float]
    expires_at: Mapped[float]
    cancelled_at: Mapped[float | None]
    completing_until: Mapped[float | None]
    """Lease expiry of the request that joins the parts."""
    num_completions: Mapped[int] = mapped_column(server_default="0")
    """Completions that were started, except those that failed because of the service itself."""
    __table_args__ = (Index("ix_uploads_counted", "project_id", **of_the_counted),)


class UploadPart(Table):
    """A part of an upload. Parts with equal bytes are stored once."""

    __tablename__ = "upload_parts"
    id: Mapped[str] = mapped_column(primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"))
    num_bytes: Mapped[int]
    digest: Mapped[str]
    """sha256 of the content, which is a blob of the artifact store."""
    created_at: Mapped[float]
    __table_args__ = (Index(None, "upload_id", "digest", unique=True),)


class AdapterExport(Table):
    """An export of an adapter or checkpoint in the format of a serving engine. It belongs to the project that requested
    it, which may be a different one than the adapter's."""

    __tablename__ = "adapter_exports"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    created_at: Mapped[float]
    created_by: Mapped[str]
    adapter_id: Mapped[str]
    """Id of an adapter, or of a checkpoint."""
    adapter_name: Mapped[str]
    adapter_artifact: Mapped[str] = mapped_column(index=True)
    """Digest of the adapter's manifest. An unfinished export keeps its files."""
    base_model: Mapped[str] = mapped_column(ForeignKey("base_models.name"))
    base_digest: Mapped[str]
    format: Mapped[str]
    """adapter, merged, gguf or gguf-lora."""
    quantization: Mapped[str | None]
    """Storage of the matrices in a GGUF model: f16 or q8_0. None for the other formats."""
    hub_repository: Mapped[str | None]
    """ORG/NAME on the Hugging Face Hub, to which the files are uploaded."""
    status: Mapped[str]
    """queued, running, succeeded, failed or cancelled."""
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """code, message, remedy. While the export is queued: why a worker does not take it."""
    refused_since: Mapped[float | None]
    """When a worker first found that it has too little disk space or memory for it, since a worker last began it."""
    artifact: Mapped[str | None] = mapped_column(ForeignKey("artifacts.digest"), index=True)
    """Digest of the manifest of its files. None for the format adapter, whose files are those of the adapter."""
    expected_bytes: Mapped[int] = mapped_column(default=0, server_default="0")
    """Estimated size of its files. Until it finishes, this counts toward the project's quota of stored bytes."""
    num_bytes: Mapped[int] = mapped_column(default=0)
    verification: Mapped[Json | None] = mapped_column(JSON(none_as_null=True))
    """Difference of the logits from those of the adapted model, in `max_abs_diff`, and `tolerance`; see
    lora_core/model_files/export.py."""
    cost: Mapped[Json | None] = mapped_column(JSON(none_as_null=True))
    """Time of a pass of the base model and of the merged model; see lora_core/model_files/merge_cost.py."""
    hub_url: Mapped[str | None] = mapped_column(Text)
    """Address of the commit on the Hub."""
    __table_args__ = (
        Index(None, "project_id", "adapter_id", "created_at"),
        Index(None, "adapter_id"),
        Index(None, "status", "created_at"),
    )
