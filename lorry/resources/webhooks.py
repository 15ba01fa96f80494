"""Webhook endpoints and their delivery log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

from lorry.models import WebhookDelivery, WebhookEndpoint, WebhookTest
from lorry.resources import pages
from lorry.transport.http import Transport

JOB_ENDS = ("fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled")


class Webhooks:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(self, url: str, *, name: str, event_types: Sequence[str] = JOB_ENDS) -> WebhookEndpoint:
        """Create an endpoint. Only this response contains its `signing_secret`."""
        body = {"url": url, "name": name, "event_types": list(event_types)}
        return WebhookEndpoint.of(self._transport.request("POST", "webhook_endpoints", body=body))

    def list(self) -> Iterator[WebhookEndpoint]:
        """Yield endpoints, newest first."""
        return (WebhookEndpoint.of(item) for item in pages.follow(self._transport, "webhook_endpoints"))

    def event_types(self) -> Iterator[str]:
        """Yield the event types to which an endpoint can subscribe."""
        yield from self._transport.get("webhook_event_types").get("data") or []

    def get(self, endpoint_id: str) -> WebhookEndpoint:
        return WebhookEndpoint.of(self._transport.get(_endpoint(endpoint_id)))

    def change(
        self,
        endpoint_id: str,
        *,
        url: str | None = None,
        name: str | None = None,
        event_types: Sequence[str] | None = None,
        enabled: bool | None = None,
    ) -> WebhookEndpoint:
        """Change an endpoint. None: unchanged. `enabled`: False keeps events without sending them, True resumes."""
        types = None if event_types is None else [*event_types]
        given: dict[str, Any] = {"url": url, "name": name, "event_types": types, "enabled": enabled}
        body = {field: value for field, value in given.items() if value is not None}
        return WebhookEndpoint.of(self._transport.request("POST", _endpoint(endpoint_id), body=body))

    def delete(self, endpoint_id: str) -> None:
        self._transport.request("DELETE", _endpoint(endpoint_id))

    def rotate_secret(self, endpoint_id: str, *, overlap_seconds: int = 86_400) -> WebhookEndpoint:
        """Create a new `signing_secret`, which only this response contains. For `overlap_seconds`, messages are also
        signed with the old one."""
        body = {"overlap_seconds": overlap_seconds}
        answer = self._transport.request("POST", f"{_endpoint(endpoint_id)}/rotate_secret", body=body)
        return WebhookEndpoint.of(answer)

    def test(self, endpoint_id: str, *, event_type: str = JOB_ENDS[0]) -> WebhookTest:
        """Send one sample event now. Raises Conflict if the endpoint does not answer."""
        answer = self._transport.request("POST", f"{_endpoint(endpoint_id)}/test", body={"event_type": event_type})
        return WebhookTest.of(answer)

    def deliveries(self, endpoint_id: str, *, status: str | None = None) -> Iterator[WebhookDelivery]:
        """Yield deliveries, newest first. `status`: pending, delivered or failed."""
        found = pages.follow(self._transport, f"{_endpoint(endpoint_id)}/deliveries", params={"status": status})
        return (WebhookDelivery.of(item) for item in found)

    def delivery(self, delivery_id: str) -> WebhookDelivery:
        return WebhookDelivery.of(self._transport.get(_delivery(delivery_id)))

    def replay(self, delivery_id: str) -> WebhookDelivery:
        """Send a delivery again now, with the same id."""
        return WebhookDelivery.of(self._transport.request("POST", f"{_delivery(delivery_id)}/replay"))

    def replay_failed(self, endpoint_id: str, *, since: int) -> int:
        """Send all deliveries again that failed since the Unix time `since`. Return their number."""
        answer = self._transport.request("POST", f"{_endpoint(endpoint_id)}/replay", body={"since": since})
        return int(answer.get("replayed") or 0)


def _endpoint(endpoint_id: str) -> str:
    return f"webhook_endpoints/{quote(endpoint_id, safe='')}"


def _delivery(delivery_id: str) -> str:
    return f"webhook_deliveries/{quote(delivery_id, safe='')}"
