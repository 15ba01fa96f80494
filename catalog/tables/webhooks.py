"""Webhooks: endpoints of projects, deliveries of events, and the requests that were made for each delivery."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Boolean, ForeignKey, Index, Integer, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import AutoKey, Json, Table

IS_DUE = text("next_try_at IS NOT NULL")


class WebhookEndpoint(Table):
    """An endpoint. Its secret is not stored: signing.py derives it from the salt and a key that is kept elsewhere."""

    __tablename__ = "webhook_endpoints"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str]
    url: Mapped[str] = mapped_column(Text)
    """The part of the URL that is shown: host and last characters."""
    sealed_url: Mapped[str] = mapped_column(Text)
    """The whole URL, encrypted; see catalog/webhooks/signing.py."""
    event_types: Mapped[list[Any]]
    salt: Mapped[str]
    ending: Mapped[str]
    """The last characters of the secret, by which users recognize it."""
    secret_made_at: Mapped[float]
    previous_salt: Mapped[str | None]
    """Salt of the secret that the last rotation replaced."""
    previous_ending: Mapped[str | None]
    previous_until: Mapped[float | None]
    """Messages are signed with both secrets until this time."""
    created_at: Mapped[float]
    updated_at: Mapped[float]
    failing_since: Mapped[float | None]
    """When the first request failed since the last success."""
    disabled_at: Mapped[float | None]
    disabled_reason: Mapped[str | None]
    """by_request, gone or failing."""
    deleted_at: Mapped[float | None]
    __table_args__ = (Index(None, "project_id", "created_at", "id"),)


class WebhookDelivery(Table):
    """One event for one endpoint. It is written in the transaction of the change that it reports, and sent afterwards
    by the process that has claimed the endpoint's task."""

    __tablename__ = "webhook_deliveries"
    id: Mapped[str] = mapped_column(primary_key=True)
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("webhook_endpoints.id"))
    event_id: Mapped[str]
    """The `webhook-id` header: the same for every request and for every endpoint of the event."""
    event_type: Mapped[str]
    event_at: Mapped[float]
    data: Mapped[Json]
    created_at: Mapped[float]
    status: Mapped[str]
    """pending, delivered or failed."""
    is_test: Mapped[bool] = mapped_column(Boolean)
    num_tries: Mapped[int] = mapped_column(Integer)
    num_tries_before: Mapped[int] = mapped_column(Integer)
    """Requests before the last replay: a replay has the full number of retries again."""
    next_try_at: Mapped[float | None]
    """When the next request is due. None unless the delivery is pending."""
    ended_at: Mapped[float | None]
    __table_args__ = (
        Index(None, "endpoint_id", "created_at", "id"),
        Index("ix_webhook_deliveries_due", "next_try_at", sqlite_where=IS_DUE, postgresql_where=IS_DUE),
        Index("ix_webhook_deliveries_turn", "endpoint_id", "next_try_at", sqlite_where=IS_DUE, postgresql_where=IS_DUE),
    )


class WebhookTry(Table):
    """One request and its response."""

    __tablename__ = "webhook_tries"
    seq: Mapped[int] = mapped_column(AutoKey, primary_key=True, autoincrement=True)
    delivery_id: Mapped[str] = mapped_column(ForeignKey("webhook_deliveries.id"), index=True)
    started_at: Mapped[float]
    seconds: Mapped[float]
    status_code: Mapped[int | None] = mapped_column(Integer)
    """None if there was no response: `error` has the reason."""
    error: Mapped[str | None] = mapped_column(Text)
    reply: Mapped[str | None] = mapped_column(Text)
    """The first bytes of the response body, escaped."""
