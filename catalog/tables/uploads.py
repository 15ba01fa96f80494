"""Files that come in parts."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Table

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
