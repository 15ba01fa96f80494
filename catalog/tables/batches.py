"""Batches: files of inference requests that are answered at low priority."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, Boolean, ForeignKey, Index, Integer
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Json, Table


class Batch(Table):
    """A file of inference requests. An API process submits them and stores the answers."""

    __tablename__ = "batches"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    created_at: Mapped[float]
    created_by: Mapped[str]
    """Id of the API key."""
    endpoint: Mapped[str]
    """Path of the route that each of its requests is for."""
    input_file: Mapped[str] = mapped_column(ForeignKey("files.id"))
    labels: Mapped[Json | None] = mapped_column(JSON(none_as_null=True))
    """`metadata` in the API."""
    lifetime_seconds: Mapped[int | None]
    """Lifetime of its output files. None: they are kept until a user deletes them."""
    status: Mapped[str]
    """A `BatchStatus`."""
    expires_at: Mapped[float]
    errors: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    """Why it failed: {code, message, param, line} for each invalid line, up to a maximum."""
    num_lines: Mapped[int] = mapped_column(default=0)
    num_completed: Mapped[int] = mapped_column(default=0)
    num_failed: Mapped[int] = mapped_column(default=0)
    prompt_tokens: Mapped[int] = mapped_column(default=0)
    completion_tokens: Mapped[int] = mapped_column(default=0)
    output_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    error_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    in_progress_at: Mapped[float | None]
    finalizing_at: Mapped[float | None]
    cancelling_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    """When it was completed, failed, cancelled or expired."""
    __table_args__ = (Index(None, "project_id", "created_at", "id"),)


class BatchLine(Table):
    """The result of one request of a batch. It is deleted after the output files of the batch are stored."""

    __tablename__ = "batch_lines"
    batch_id: Mapped[str] = mapped_column(ForeignKey("batches.id"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    """Line of the input file, from 1."""
    is_failed: Mapped[bool] = mapped_column(Boolean)
    result: Mapped[Json]
    """The line of the output file, or of the error file if the request failed."""
