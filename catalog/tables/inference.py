"""Base models that inference requests wait for."""

from __future__ import annotations

from sqlalchemy import JSON, ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Json, Table


class WantedBase(Table):
    """A base model that requests wait for, because no worker has it loaded. Its task `load` is claimed by the worker
    that loads it. API servers extend `wanted_until` while requests wait."""

    __tablename__ = "wanted_bases"
    pack_key: Mapped[str] = mapped_column(primary_key=True)
    """The trainers that can answer the requests."""
    base_model: Mapped[str] = mapped_column(ForeignKey("base_models.name"))
    base_digest: Mapped[str]
    wanted_since: Mapped[float]
    wanted_until: Mapped[float]
    clients_until: Mapped[float]
    """Until when clients want it. Earlier than `wanted_until` if only batches do."""
    error: Mapped[Json | None] = mapped_column(JSON(none_as_null=True))
    """Why it could not be loaded."""
    failed_at: Mapped[float | None]
    """Requests that arrived before this time fail with `error`."""
