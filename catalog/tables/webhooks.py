"""Webhooks: where events of a project are sent, what is to be sent, and each try at it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Boolean, ForeignKey, Index, Integer, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import AutoKey, Json, Leased, Table

IS_DUE = text("next_try_at IS NOT NULL")


class WebhookEndpoint(Table):
    """Its secret is not stored: catalog/webhooks/signing.py makes it of the salt, and of a key kept elsewhere."""

    __tablename__ = "webhook_endpoints"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str]
    url: Mapped[str] = mapped_column(Text)
    """What is shown of it: host and last characters. In rows without `sealed_url`: the whole."""
    sealed_url: Mapped[str | None] = mapped_column(Text)
    """The whole, encrypted: see catalog/webhooks/sealed_urls.py."""
    event_types: Mapped[list[Any]]
    salt: Mapped[str]
    ending: Mapped[str]
    """The last characters of the secret, to tell it from others by."""
    secret_made_at: Mapped[float]
    previous_salt: Mapped[str | None]
    """Of the secret that a rotation replaced."""
    previous_ending: Mapped[str | None]
    previous_until: Mapped[float | None]
    """Until then messages are signed with both."""
    created_at: Mapped[float]
    updated_at: Mapped[float]
    failing_since: Mapped[float | None]
    """The first of the tries that failed since one succeeded."""
    disabled_at: Mapped[float | None]
    disabled_reason: Mapped[str | None]
    """by_request, gone or failing."""
    deleted_at: Mapped[float | None]
    __table_args__ = (Index(None, "project_id", "created_at", "id"),)


class WebhookDelivery(Leased, Table):
    """One event for one endpoint: written in the transaction of what it tells of, and sent after that. It is leased to
    the process that sends it."""

    __tablename__ = "webhook_deliveries"
    id: Mapped[str] = mapped_column(primary_key=True)
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("webhook_endpoints.id"))
    event_id: Mapped[str]
    """The wire's webhook-id: the same at every try, and for every endpoint that the event goes to."""
    event_type: Mapped[str]
    event_at: Mapped[float]
    data: Mapped[Json]
    created_at: Mapped[float]
    status: Mapped[str]
    """pending, delivered or failed."""
    is_test: Mapped[bool] = mapped_column(Boolean)
    num_tries: Mapped[int] = mapped_column(Integer)
    num_tries_before: Mapped[int] = mapped_column(Integer)
    """Tries before it was last replayed: a replay has all tries again."""
    next_try_at: Mapped[float | None]
    """When it is due. None once it is not pending."""
    ended_at: Mapped[float | None]
    __table_args__ = (
        Index(None, "endpoint_id", "created_at", "id"),
        Index("ix_webhook_deliveries_due", "next_try_at", sqlite_where=IS_DUE, postgresql_where=IS_DUE),
        Index("ix_webhook_deliveries_turn", "endpoint_id", "next_try_at", sqlite_where=IS_DUE, postgresql_where=IS_DUE),
    )


class WebhookTry(Table):
    """One request, and what came back."""

    __tablename__ = "webhook_tries"
    seq: Mapped[int] = mapped_column(AutoKey, primary_key=True, autoincrement=True)
    delivery_id: Mapped[str] = mapped_column(ForeignKey("webhook_deliveries.id"), index=True)
    started_at: Mapped[float]
    seconds: Mapped[float]
    status_code: Mapped[int | None] = mapped_column(Integer)
    """None where there was no answer: then `error` says why."""
    error: Mapped[str | None] = mapped_column(Text)
    reply: Mapped[str | None] = mapped_column(Text)
    """The first bytes of the answer's body, escaped."""
