"""Who changed what: events that are only ever added, and the chain that they are sealed into."""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import Index, Integer, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import AutoKey, Json, Table

UNSEALED = text("link IS NULL")
of_the_unsealed: dict[str, Any] = {"sqlite_where": UNSEALED, "postgresql_where": UNSEALED}


class AuditEvent(Table):
    """Written in the transaction of the change that it tells of. Only sealing ever touches it again."""

    __tablename__ = "audit_events"
    seq: Mapped[int] = mapped_column(AutoKey, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    type: Mapped[str]
    effective_at: Mapped[float]
    project_id: Mapped[str | None]
    """Whose thing it is about; None: nobody's alone, such as a base model."""
    object_id: Mapped[str | None]
    actor_type: Mapped[str]
    actor_id: Mapped[str | None]
    """The API key; of a browser the one that signed it in. None: who has the server itself."""
    actor_name: Mapped[str | None]
    request_id: Mapped[str | None]
    address: Mapped[str | None]
    details: Mapped[Json]
    link: Mapped[int | None] = mapped_column(unique=True)
    """Its place in the chain, from 1. This and the next two are set once, when it is sealed."""
    previous: Mapped[str | None]
    """Digest of the event before."""
    digest: Mapped[str | None]
    """HMAC-SHA256 of the event (audit_chain.seal_of), in hex."""
    __table_args__ = (
        Index(None, "effective_at", "id"),
        Index(None, "project_id", "effective_at", "id"),
        Index(None, "actor_id", "effective_at", "id"),
        Index(None, "type", "effective_at", "id"),
        Index("ix_audit_events_unsealed", "seq", **of_the_unsealed),
    )


class AuditHead(Table):
    """One row: where the chain ends. Who seals holds it."""

    __tablename__ = "audit_head"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    link: Mapped[int]
    digest: Mapped[str]


class RetiredKey(Table):
    """The keys that were derived from one replaced pepper (derived_keys)."""

    __tablename__ = "retired_keys"
    WIRE_OBJECT: ClassVar = "retired_key"
    """`object` of such a row in an export of the audit log."""
    id: Mapped[str] = mapped_column(primary_key=True)
    sealed: Mapped[str] = mapped_column(Text)
    """Base64; AES-256-GCM under the current pepper."""
