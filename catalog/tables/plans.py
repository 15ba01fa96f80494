"""Plans, and what is known of two data files beside each other."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Json, Leased, Table


class Plan(Leased, Table):
    """What a job would come to. Its row goes when it has expired. It is leased to the worker that computes it."""

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
    """As a job's: the request without what it left out."""
    spec: Mapped[Json]
    training_file: Mapped[str] = mapped_column(ForeignKey("files.id"))
    validation_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    train_prepared: Mapped[str]
    """Keys in `prepared`, known before the files are."""
    valid_prepared: Mapped[str | None]
    found: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """What it comes to, once it is ready."""
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """code, message, param: why no job could train on these files."""
    num_lost: Mapped[int] = mapped_column(default=0)
    """Times that a worker went away while it computed this, or could not."""
    run_after: Mapped[float | None]
    __table_args__ = (
        Index(None, "project_id", "created_at", "id"),
        Index(None, "state", "created_at"),
        Index(None, "expires_at"),
    )


class FileOverlap(Table):
    """How many rows of one prepared file are in another."""

    __tablename__ = "file_overlaps"
    train_key: Mapped[str] = mapped_column(primary_key=True)
    valid_key: Mapped[str] = mapped_column(primary_key=True)
    num_rows: Mapped[int]
    """Of the held-out file, that are in the training file too."""
    of_rows: Mapped[int]
    """That the held-out file has."""
