"""Webhook endpoints and their delivery log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorry.models import WebhookDelivery, WebhookEndpoint, WebhookTest
from lorry.resources.resource import Resource, given, url

_PATH = "webhook_endpoints"
_DELIVERIES = "webhook_deliveries"
JOB_ENDS = ("fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled")


class Webhooks(Resource):
    def create(self, url: str, *, name: str, event_types: Sequence[str] = JOB_ENDS) -> WebhookEndpoint:
        """Create an endpoint. Only this response contains its `signing_secret`."""
        body = {"url": url, "name": name, "event_types": list(event_types)}
        return self._post(WebhookEndpoint, _PATH, body=body)

    def list(self) -> Iterator[WebhookEndpoint]:
        """Yield endpoints, newest first."""
        return self._list(WebhookEndpoint, _PATH)

    def event_types(self) -> Iterator[str]:
        """Yield the event types to which an endpoint can subscribe."""
        yield from self._transport.get("webhook_event_types").get("data") or []

    def get(self, endpoint_id: str) -> WebhookEndpoint:
        return self._get(WebhookEndpoint, _PATH, endpoint_id)

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
        body = given(url=url, name=name, event_types=types, enabled=enabled)
        return self._post(WebhookEndpoint, _PATH, endpoint_id, body=body)

    def delete(self, endpoint_id: str) -> None:
        self._delete(_PATH, endpoint_id)

    def rotate_secret(self, endpoint_id: str, *, overlap_seconds: int = 86_400) -> WebhookEndpoint:
        """Create a new `signing_secret`, which only this response contains. For `overlap_seconds`, messages are also
        signed with the old one."""
        body = {"overlap_seconds": overlap_seconds}
        return self._post(WebhookEndpoint, _PATH, endpoint_id, "rotate_secret", body=body)

    def test(self, endpoint_id: str, *, event_type: str = JOB_ENDS[0]) -> WebhookTest:
        """Send one sample event now. Raises Conflict if the endpoint does not answer."""
        return self._post(WebhookTest, _PATH, endpoint_id, "test", body={"event_type": event_type})

    def deliveries(self, endpoint_id: str, *, status: str | None = None) -> Iterator[WebhookDelivery]:
        """Yield deliveries, newest first. `status`: pending, delivered or failed."""
        return self._list(WebhookDelivery, _PATH, endpoint_id, "deliveries", params={"status": status})

    def delivery(self, delivery_id: str) -> WebhookDelivery:
        return self._get(WebhookDelivery, _DELIVERIES, delivery_id)

    def replay(self, delivery_id: str) -> WebhookDelivery:
        """Send a delivery again now, with the same id."""
        return self._post(WebhookDelivery, _DELIVERIES, delivery_id, "replay")

    def replay_failed(self, endpoint_id: str, *, since: int) -> int:
        """Send all deliveries again that failed since the Unix time `since`. Return their number."""
        answer = self._transport.request("POST", url(_PATH, endpoint_id, "replay"), body={"since": since})
        return int(answer.get("replayed") or 0)
