"""Typed responses for webhooks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lorry.models.jobs import View


@dataclass(frozen=True, kw_only=True)
class WebhookEndpoint(View):
    """A webhook endpoint. `signing_secret` is set only in the response that creates it or rotates its secret."""

    id: str = ""
    name: str = ""
    url: str = ""
    """Host and last four characters. The service never shows the full URL."""
    event_types: list[str] = field(default_factory=list[str])
    signing_secret: str = field(default="", repr=False)
    signing_secret_hint: str = ""
    status: str = ""
    created_at: int = 0
    updated_at: int = 0
    old_secret_until: int | None = None
    """Unix time until which messages are also signed with the old secret."""
    failing_since: int | None = None
    """Every attempt since this time has failed."""
    disabled_at: int | None = None
    disabled_reason: str | None = None
    """by_request, gone or failing."""


@dataclass(frozen=True, kw_only=True)
class WebhookTest(View):
    """An endpoint's response to a sample event. `reply` contains the first bytes of the response."""

    webhook_endpoint_id: str = ""
    event_type: str = ""
    status_code: int = 0
    delivery_id: str = ""
    reply: str = ""


@dataclass(frozen=True, kw_only=True)
class WebhookDelivery(View):
    """One event for one endpoint. `tries` lists the attempts: started_at, seconds, status_code, error, reply."""

    id: str = ""
    webhook_endpoint_id: str = ""
    event_id: str = ""
    """The `webhook-id` header, the same in every attempt."""
    event_type: str = ""
    data: dict[str, Any] = field(default_factory=dict[str, Any])
    is_test: bool = False
    status: str = ""
    """pending, delivered or failed."""
    created_at: int = 0
    ended_at: int | None = None
    next_try_at: int | None = None
    tries: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
