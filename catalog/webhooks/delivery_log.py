"""Lists webhook deliveries, and sends them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from catalog.audit import log
from catalog.db.database import Database, read_clock
from catalog.db.pagination import Page, paginate
from catalog.errors import Conflict, NotFound
from catalog.tables.webhooks import WebhookDelivery, WebhookEndpoint, WebhookTry
from catalog.webhooks import endpoints, outbox

KEPT_SECONDS = 30 * 86_400.0
"""How long finished deliveries are kept."""
Status = Literal["pending", "delivered", "failed"]


def list_page(
    db: Database,
    *,
    project_id: str,
    endpoint_id: str,
    status: Status | None = None,
    after: str | None = None,
    limit: int = 20,
) -> Page[WebhookDelivery]:
    """Return a page of the endpoint's deliveries, newest first. Raises NotFound."""
    with db.read() as session:
        endpoints.find(session, project_id=project_id, endpoint_id=endpoint_id)
        return paginate(
            session,
            select(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id),
            created=WebhookDelivery.created_at,
            ident=WebhookDelivery.id,
            after=after,
            limit=limit,
            visible=() if status is None else (WebhookDelivery.status == status,),
        )


def get(db: Database, *, project_id: str, delivery_id: str) -> WebhookDelivery:
    """Return the delivery. Raises NotFound."""
    with db.read() as session:
        return _find(session, project_id=project_id, delivery_id=delivery_id)[0]


def tries(db: Database, delivery_ids: Sequence[str]) -> dict[str, list[WebhookTry]]:
    """Return the attempts of each delivery, in order."""
    found: dict[str, list[WebhookTry]] = {delivery_id: [] for delivery_id in delivery_ids}
    with db.read() as session:
        wanted = select(WebhookTry).where(WebhookTry.delivery_id.in_(delivery_ids)).order_by(WebhookTry.seq)
        for row in session.scalars(wanted):
            found[row.delivery_id].append(row)
    return found


def replay(db: Database, *, project_id: str, delivery_id: str) -> WebhookDelivery:
    """Schedule the delivery to be sent again now, with the same event id and all its attempts.

    The result of a request that is in progress counts. Raises NotFound, and Conflict if its endpoint is disabled.
    """
    with db.write() as session:
        _, endpoint = _find(session, project_id=project_id, delivery_id=delivery_id)
        endpoint = endpoints.find(session, project_id=project_id, endpoint_id=endpoint.id, lock=True)
        _check_open(endpoint)
        locked = select(WebhookDelivery).where(WebhookDelivery.id == delivery_id).with_for_update()
        row = session.scalars(locked.execution_options(populate_existing=True)).one()
        now = read_clock(session)
        row.status, row.next_try_at, row.ended_at = "pending", now, None
        row.num_tries_before = row.num_tries
        outbox.wake(session, endpoint.id, project_id=project_id, now=now)
        details = {"webhook_endpoint_id": endpoint.id, "event_id": row.event_id}
        log.note(
            session, "webhook_delivery.replayed", now=now, object_id=row.id, project_id=project_id, details=details
        )
        return row


def replay_failed(db: Database, *, project_id: str, endpoint_id: str, since: float) -> int:
    """Schedule all failed deliveries since a time to be sent again, except tests. Returns how many.

    Raises NotFound, and Conflict if the endpoint is disabled.
    """
    with db.write() as session:
        endpoint = endpoints.find(session, project_id=project_id, endpoint_id=endpoint_id, lock=True)
        _check_open(endpoint)
        now = read_clock(session)
        failed = (
            WebhookDelivery.endpoint_id == endpoint_id,
            WebhookDelivery.created_at >= since,
            WebhookDelivery.status == "failed",
            WebhookDelivery.is_test.is_(False),
        )
        again = {"status": "pending", "next_try_at": now, "ended_at": None}
        statement = update(WebhookDelivery).where(*failed)
        done = session.execute(statement.values(**again, num_tries_before=WebhookDelivery.num_tries))
        number = int(getattr(done, "rowcount", 0))
        outbox.wake(session, endpoint.id, project_id=project_id, now=now)
        endpoints.note(session, endpoint, "webhook_endpoint.replayed", now=now, since=since, replayed=number)
        return number


def forget(db: Database) -> None:
    """Delete finished deliveries older than KEPT_SECONDS, and endpoints deleted before that without deliveries."""
    with db.write() as session:
        before = read_clock(session) - KEPT_SECONDS
        of_any = WebhookDelivery.endpoint_id.in_(select(WebhookEndpoint.id))
        old = (of_any, WebhookDelivery.created_at < before, WebhookDelivery.next_try_at.is_(None))
        session.execute(delete(WebhookTry).where(WebhookTry.delivery_id.in_(select(WebhookDelivery.id).where(*old))))
        session.execute(delete(WebhookDelivery).where(*old))
        unused = ~select(WebhookDelivery.id).where(WebhookDelivery.endpoint_id == WebhookEndpoint.id).exists()
        session.execute(delete(WebhookEndpoint).where(WebhookEndpoint.deleted_at < before, unused))


def _find(session: Session, *, project_id: str, delivery_id: str) -> tuple[WebhookDelivery, WebhookEndpoint]:
    own = select(WebhookDelivery, WebhookEndpoint).join(WebhookEndpoint)
    found = session.execute(
        own.where(
            WebhookDelivery.id == delivery_id,
            WebhookEndpoint.project_id == project_id,
            WebhookEndpoint.deleted_at.is_(None),
        )
    ).first()
    if found is None:
        raise NotFound("webhook_delivery_not_found", delivery_id=delivery_id)
    return found[0], found[1]


def _check_open(endpoint: WebhookEndpoint) -> None:
    if endpoint.disabled_at is not None:
        raise Conflict("webhook_endpoint_disabled", endpoint=endpoint.name, endpoint_id=endpoint.id)
