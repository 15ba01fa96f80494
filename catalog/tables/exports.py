"""Exports of adapters: merged models, GGUF files, and uploads to the Hugging Face Hub."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, ForeignKey, Index, Text
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Json, Table

UNFINISHED_EXPORTS = ("queued", "running")
"""The states of an export on which a worker works, or will work."""


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
