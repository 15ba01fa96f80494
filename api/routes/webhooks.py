"""/v1/webhook_endpoints, /v1/webhook_deliveries and /v1/webhook_event_types: notifications and their delivery log."""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated

from fastapi import Query

from api.auth.authentication import Signed
from api.deps import After, IsRetry, Limit, Services, Use
from api.rate_limits.threads import run_route
from api.requests.parameters import WebhookDeliveryId, WebhookEndpointId
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.pagination import ListPage, page_of
from api.schemas.webhooks import (
    Replayed,
    ReplayRequest,
    SecretRotation,
    WebhookDeliveryObject,
    WebhookEndpointChange,
    WebhookEndpointDeleted,
    WebhookEndpointObject,
    WebhookEndpointRequest,
    WebhookEndpointWithSecret,
    WebhookEventTypes,
    WebhookTestRequest,
    WebhookTestResult,
    delivery_object,
    endpoint_object,
    with_secret,
)
from catalog.db.database import read_clock
from catalog.errors import Conflict
from catalog.tables.webhooks import WebhookDelivery
from catalog.webhooks import delivery_log, delivery_queue, endpoints, signing
from catalog.webhooks.delivery_log import Status
from catalog.webhooks.delivery_queue import DeliveryResult
from catalog.webhooks.outbox import EVENT_TYPES, SAMPLE_IDS
from catalog.webhooks.url_policy import OPENED, target_of

router = Router(prefix="/v1", tags=["webhooks"], responses=SIGNED)
ENDPOINT = "/webhook_endpoints/{webhook_endpoint_id}"
DELIVERY = "/webhook_deliveries/{webhook_delivery_id}"
WithStatus = Annotated[Status | None, Query(description="Return only deliveries with this status.")]


@router.get("/webhook_event_types", operation_id="list_webhook_event_types")
def list_webhook_event_types(_caller: Signed) -> WebhookEventTypes:
    """List the event types to which an endpoint can subscribe. Requires the scope `webhooks:read`."""
    return WebhookEventTypes(data=list(EVENT_TYPES))


@router.post("/webhook_endpoints", operation_id="create_webhook_endpoint", responses=errors(409))
def create_webhook_endpoint(
    body: WebhookEndpointRequest, use: Use, caller: Signed, is_retry: IsRetry
) -> WebhookEndpointWithSecret:
    """Create a webhook endpoint. A project has at most 20.

    Only this response contains the full URL. Only this response and that of a rotation contain the secret. Requires the
    scope `webhooks:write`.
    """
    target_of(body.url, use.webhooks.rules)
    row, secret = endpoints.create(
        use.db,
        project_id=caller.project_id,
        name=body.name,
        url=body.url,
        event_types=body.event_types,
        pepper=use.pepper,
        is_client_retry=is_retry,
    )
    return with_secret(row, secret, now=_now(use)).model_copy(update={"url": body.url})


@router.get("/webhook_endpoints", operation_id="list_webhook_endpoints")
def list_webhook_endpoints(
    use: Use, caller: Signed, after: After = None, limit: Limit = 20
) -> ListPage[WebhookEndpointObject]:
    """List the project's endpoints, newest first. Requires the scope `webhooks:read`."""
    page = endpoints.list_page(use.db, project_id=caller.project_id, after=after, limit=limit)
    now = _now(use)
    return page_of([endpoint_object(row, now=now) for row in page.items], has_more=page.has_more)


@router.get(ENDPOINT, operation_id="get_webhook_endpoint", responses=errors(404))
def get_webhook_endpoint(webhook_endpoint_id: WebhookEndpointId, use: Use, caller: Signed) -> WebhookEndpointObject:
    """Return an endpoint. Requires the scope `webhooks:read`."""
    row = endpoints.get(use.db, project_id=caller.project_id, endpoint_id=webhook_endpoint_id)
    return endpoint_object(row, now=_now(use))


@router.post(ENDPOINT, operation_id="change_webhook_endpoint", responses=errors(404))
def change_webhook_endpoint(
    webhook_endpoint_id: WebhookEndpointId, body: WebhookEndpointChange, use: Use, caller: Signed
) -> WebhookEndpointObject:
    """Change an endpoint. Pending deliveries go to the new URL. Requires the scope `webhooks:write`."""
    if body.url is not None:
        target_of(body.url, use.webhooks.rules)
    changes = endpoints.EndpointChange(name=body.name, url=body.url, event_types=body.event_types, enabled=body.enabled)
    row = endpoints.change(
        use.db, project_id=caller.project_id, endpoint_id=webhook_endpoint_id, changes=changes, pepper=use.pepper
    )
    return endpoint_object(row, now=_now(use))


@router.delete(ENDPOINT, operation_id="delete_webhook_endpoint", responses=errors(404))
def delete_webhook_endpoint(
    webhook_endpoint_id: WebhookEndpointId, use: Use, caller: Signed, is_retry: IsRetry
) -> WebhookEndpointDeleted:
    """Delete an endpoint. Nothing more is sent to it. Requires the scope `webhooks:write`."""
    endpoints.delete(use.db, project_id=caller.project_id, endpoint_id=webhook_endpoint_id, is_client_retry=is_retry)
    return WebhookEndpointDeleted(id=webhook_endpoint_id)


@router.post(f"{ENDPOINT}/rotate_secret", operation_id="rotate_webhook_secret", responses=errors(404, 409))
def rotate_webhook_secret(
    webhook_endpoint_id: WebhookEndpointId,
    use: Use,
    caller: Signed,
    is_retry: IsRetry,
    body: SecretRotation | None = None,
) -> WebhookEndpointWithSecret:
    """Create a new secret. While the old one is still valid, each message has a signature with both.

    Requires the scope `webhooks:write`.
    """
    row, secret = endpoints.rotate(
        use.db,
        project_id=caller.project_id,
        endpoint_id=webhook_endpoint_id,
        overlap_seconds=(body or SecretRotation()).seconds(),
        pepper=use.pepper,
        is_client_retry=is_retry,
    )
    return with_secret(row, secret, now=_now(use))


@router.post(f"{ENDPOINT}/test", operation_id="test_webhook_endpoint", responses=errors(404, 409))
async def test_webhook_endpoint(
    webhook_endpoint_id: WebhookEndpointId, body: WebhookTestRequest, use: Use, caller: Signed
) -> WebhookTestResult:
    """Send one sample event now, without retries, even if the endpoint is not subscribed to its type.

    The object that the event names does not exist. Requires the scope `webhooks:write`.
    """
    project_id = caller.project_id
    get = partial(endpoints.get, use.db, project_id=project_id, endpoint_id=webhook_endpoint_id)
    endpoint = await run_route(project_id, get)
    now = await run_route(project_id, partial(_now, use))
    delivery = delivery_queue.new_test(endpoint, body.event_type, subject=SAMPLE_IDS[body.event_type], now=now)
    secrets = signing.good(endpoint, use.pepper, now=now)
    url = signing.get(endpoint, peppers=use.pepper.all())
    outcome = await _sent(use, project_id, url, delivery, secrets)
    await run_route(project_id, partial(delivery_queue.record_test, use.db, endpoint, delivery, outcome))
    if outcome.status_code is None:
        error = outcome.error or ""
        reason = error.removesuffix(OPENED).rstrip()
        raise Conflict(
            "webhook_test_blocked"
            if error.endswith(OPENED)
            else ("webhook_test_certificate" if "CERTIFICATE_VERIFY_FAILED" in error else "webhook_test_failed"),
            endpoint=endpoint.id,
            reason=reason,
        )
    return WebhookTestResult(
        webhook_endpoint_id=endpoint.id,
        event_type=body.event_type,
        status_code=outcome.status_code,
        delivery_id=delivery.id,
        reply=outcome.reply or "",
    )


@router.post(f"{ENDPOINT}/replay", operation_id="replay_webhook_endpoint", responses=errors(404, 409))
def replay_webhook_endpoint(
    webhook_endpoint_id: WebhookEndpointId, body: ReplayRequest, use: Use, caller: Signed
) -> Replayed:
    """Send all deliveries again that failed since a given time, with the same IDs.

    Requires the scope `webhooks:write`.
    """
    number = delivery_log.replay_failed(
        use.db, project_id=caller.project_id, endpoint_id=webhook_endpoint_id, since=body.since
    )
    use.deliverer.wake()
    return Replayed(webhook_endpoint_id=webhook_endpoint_id, replayed=number)


@router.get(f"{ENDPOINT}/deliveries", operation_id="list_webhook_deliveries", responses=errors(404))
def list_webhook_deliveries(
    webhook_endpoint_id: WebhookEndpointId,
    use: Use,
    caller: Signed,
    *,
    after: After = None,
    limit: Limit = 20,
    status: WithStatus = None,
) -> ListPage[WebhookDeliveryObject]:
    """List the endpoint's deliveries of the last 30 days, newest first. Requires the scope `webhooks:read`."""
    page = delivery_log.list_page(
        use.db,
        project_id=caller.project_id,
        endpoint_id=webhook_endpoint_id,
        status=status,
        after=after,
        limit=limit,
    )
    return page_of(_delivery_objects(use, page.items), has_more=page.has_more)


@router.get(DELIVERY, operation_id="get_webhook_delivery", responses=errors(404))
def get_webhook_delivery(webhook_delivery_id: WebhookDeliveryId, use: Use, caller: Signed) -> WebhookDeliveryObject:
    """Return a delivery with its attempts. Requires the scope `webhooks:read`."""
    row = delivery_log.get(use.db, project_id=caller.project_id, delivery_id=webhook_delivery_id)
    return _delivery_objects(use, [row])[0]


@router.post(f"{DELIVERY}/replay", operation_id="replay_webhook_delivery", responses=errors(404, 409))
def replay_webhook_delivery(webhook_delivery_id: WebhookDeliveryId, use: Use, caller: Signed) -> WebhookDeliveryObject:
    """Send a delivery again now, with the same ID and the full number of retries.

    Requires the scope `webhooks:write`.
    """
    row = delivery_log.replay(use.db, project_id=caller.project_id, delivery_id=webhook_delivery_id)
    use.deliverer.wake()
    return _delivery_objects(use, [row])[0]


async def _sent(
    use: Services, project_id: str, url: str, delivery: WebhookDelivery, secrets: list[str]
) -> DeliveryResult:
    body = signing.body_of(delivery)
    headers = signing.headers(body, message_id=delivery.event_id, at=time.time(), signed_with=secrets)
    async with use.webhooks.tests.slot(project_id):
        return await use.webhooks.send(url, project_id=project_id, body=body, headers=headers)


def _delivery_objects(use: Services, rows: list[WebhookDelivery]) -> list[WebhookDeliveryObject]:
    tries = delivery_log.tries(use.db, [row.id for row in rows])
    return [delivery_object(row, tries[row.id]) for row in rows]


def _now(use: Services) -> float:
    with use.db.read() as session:
        return read_clock(session)
