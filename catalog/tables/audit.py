"""The audit log: append-only events, and the hash chain that seals them."""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import Index, Integer, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import AutoKey, Json, Table

UNSEALED = text("link IS NULL")
of_the_unsealed: dict[str, Any] = {"sqlite_where": UNSEALED, "postgresql_where": UNSEALED}


class AuditEvent(Table):
    """One audit event, written in the transaction of the change that it describes. Only sealing updates it."""

    __tablename__ = "audit_events"
    seq: Mapped[int] = mapped_column(AutoKey, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    type: Mapped[str]
    effective_at: Mapped[float]
    project_id: Mapped[str | None]
    """The project that owns the object. None: no single project owns it, for example a base model."""
    object_id: Mapped[str | None]
    actor_type: Mapped[str]
    actor_id: Mapped[str | None]
    """The API key; for a browser session, the key that signed in. None: an administrator on the server itself."""
    actor_name: Mapped[str | None]
    request_id: Mapped[str | None]
    address: Mapped[str | None]
    details: Mapped[Json]
    link: Mapped[int | None] = mapped_column(unique=True)
    """Position in the chain, from 1. Sealing sets this and the next two columns, once."""
    previous: Mapped[str | None]
    """Digest of the previous event."""
    digest: Mapped[str | None]
    """HMAC-SHA256 of the event (`seal_of` in catalog/audit/chain.py), in hex."""
    __table_args__ = (
        Index(None, "effective_at", "id"),
        Index(None, "project_id", "effective_at", "id"),
        Index(None, "actor_id", "effective_at", "id"),
        Index(None, "type", "effective_at", "id"),
        Index("ix_audit_events_unsealed", "seq", **of_the_unsealed),
    )


class AuditHead(Table):
    """One row: the last link of the chain. The process that seals events locks it."""

    __tablename__ = "audit_head"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    link: Mapped[int]
    digest: Mapped[str]


class RetiredKey(Table):
    """The keys that were derived from one replaced pepper (derived_keys)."""

    __tablename__ = "retired_keys"
    WIRE_OBJECT: ClassVar = "retired_key"
    """The `object` value of a retired key in an export of the audit log."""
    id: Mapped[str] = mapped_column(primary_key=True)
    sealed: Mapped[str] = mapped_column(Text)
    """Base64; AES-256-GCM under the current pepper."""
