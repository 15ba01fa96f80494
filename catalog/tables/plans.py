"""Plans, and the overlap of two data files."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Json, Table


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
