"""Webhook endpoints: create, change, rotate, disable and delete.

A transaction that locks an endpoint and its deliveries locks the endpoint first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from catalog.audit import log
from catalog.audit.log import AuditType
from catalog.db.database import Database, read_clock, serialize
from catalog.db.pagination import Page, paginate
from catalog.errors import Conflict, NotFound
from catalog.pepper import Pepper
from catalog.tables.table import new_id
from catalog.tables.webhooks import WebhookDelivery, WebhookEndpoint
from catalog.webhooks import signing
from catalog.webhooks.outbox import EventType

MAX_ENDPOINTS = 20
"""Maximum per project. Each event is written once for each endpoint."""
REPEAT_SECONDS = 600.0
"""How long a client's retry has the same response as its first request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointChange:
    """The fields to change; None: unchanged."""

    name: str | None = None
    url: str | None = None
    event_types: Sequence[EventType] | None = None
    enabled: bool | None = None


def create(
    db: Database,
    *,
    project_id: str,
    name: str,
    url: str,
    event_types: Sequence[EventType],
    pepper: Pepper,
    is_client_retry: bool = False,
) -> tuple[WebhookEndpoint, str]:
    """Create an endpoint. Returns it with its secret, which is not shown again.

    is_client_retry: the client repeats a request that had no reply; a recent, equal endpoint is then returned. Raises
    Conflict if the project has MAX_ENDPOINTS.
    """
    wanted = _distinct(event_types)
    with db.write() as session:
        serialize(session, f"webhook endpoints of {project_id}")
        now = read_clock(session)
        own = (WebhookEndpoint.project_id == project_id, WebhookEndpoint.deleted_at.is_(None))
        if is_client_retry:
            recent = select(WebhookEndpoint).where(*own, WebhookEndpoint.created_at > now - REPEAT_SECONDS)
            for row in session.scalars(recent):
                if (row.name, row.event_types) == (name, wanted) and _has_url(row, url, pepper):
                    return row, signing.current(row, pepper)
        if (session.scalar(select(func.count()).select_from(WebhookEndpoint).where(*own)) or 0) >= MAX_ENDPOINTS:
            raise _too_many()
        secret = signing.new(pepper)
        row = WebhookEndpoint(
            id=new_id("webhook"),
            project_id=project_id,
            name=name,
            event_types=wanted,
            salt=secret.salt,
            ending=secret.ending,
            secret_made_at=now,
            created_at=now,
            updated_at=now,
        )
        signing.put(row, url, peppers=pepper.all())
        session.add(row)
        note(session, row, "webhook_endpoint.created", now=now)
    return row, secret.text


def list_page(db: Database, *, project_id: str, after: str | None = None, limit: int = 20) -> Page[WebhookEndpoint]:
    """Return a page of the project's endpoints, newest first."""
    with db.read() as session:
        return paginate(
            session,
            select(WebhookEndpoint).where(WebhookEndpoint.project_id == project_id),
            created=WebhookEndpoint.created_at,
            ident=WebhookEndpoint.id,
            after=after,
            limit=limit,
            visible=(WebhookEndpoint.deleted_at.is_(None),),
        )


def get(db: Database, *, project_id: str, endpoint_id: str) -> WebhookEndpoint:
    """Return the endpoint. Raises NotFound."""
    with db.read() as session:
        return find(session, project_id=project_id, endpoint_id=endpoint_id)


def change(
    db: Database, *, project_id: str, endpoint_id: str, changes: EndpointChange, pepper: Pepper
) -> WebhookEndpoint:
    """Change the endpoint. Pending deliveries are sent to the new URL. Raises NotFound."""
    with db.write() as session:
        row = find(session, project_id=project_id, endpoint_id=endpoint_id, lock=True)
        before = (row.name, row.sealed_url, row.event_types, row.disabled_at)
        row.name = row.name if changes.name is None else changes.name
        if changes.url is not None and not _has_url(row, changes.url, pepper):
            signing.put(row, changes.url, peppers=pepper.all())
        row.event_types = row.event_types if changes.event_types is None else _distinct(changes.event_types)
        if changes.enabled is True:
            row.disabled_at = row.disabled_reason = row.failing_since = None
        if changes.enabled is False and row.disabled_at is None:
            disable(session, row, reason="by_request", now=read_clock(session))
        if before != (row.name, row.sealed_url, row.event_types, row.disabled_at):
            row.updated_at = now = read_clock(session)
            note(session, row, "webhook_endpoint.updated", now=now, enabled=row.disabled_at is None)
        return row


def rotate(
    db: Database,
    *,
    project_id: str,
    endpoint_id: str,
    overlap_seconds: float,
    pepper: Pepper,
    is_client_retry: bool = False,
) -> tuple[WebhookEndpoint, str]:
    """Replace the secret and return the new one. For `overlap_seconds`, messages are also signed with the old one.

    is_client_retry: the client repeats a request that had no reply; a recently created secret is then returned. Raises
    NotFound.
    """
    with db.write() as session:
        row = find(session, project_id=project_id, endpoint_id=endpoint_id, lock=True)
        now = read_clock(session)
        was_answered = row.secret_made_at > max(row.created_at, now - REPEAT_SECONDS)
        if is_client_retry and was_answered:  # another rotation would end the overlap of the first
            return row, signing.current(row, pepper)
        secret = signing.new(pepper)
        overlaps = overlap_seconds > 0
        row.previous_salt, row.previous_ending = (row.salt, row.ending) if overlaps else (None, None)
        row.previous_until = now + overlap_seconds if overlaps else None
        row.salt, row.ending, row.secret_made_at, row.updated_at = secret.salt, secret.ending, now, now
        note(session, row, "webhook_endpoint.secret_rotated", now=now, overlap_seconds=overlap_seconds)
        return row, secret.text


def delete(db: Database, *, project_id: str, endpoint_id: str, is_client_retry: bool = False) -> None:
    """Delete the endpoint. Its pending deliveries fail. Raises NotFound."""
    with db.write() as session:
        row = find(session, project_id=project_id, endpoint_id=endpoint_id, lock=True, include_deleted=is_client_retry)
        if row.deleted_at is None:
            row.deleted_at = now = read_clock(session)
            fail_pending(session, row.id, now=now)
            note(session, row, "webhook_endpoint.deleted", now=now)


def note(session: Session, row: WebhookEndpoint, type: AuditType, *, now: float, **more: object) -> None:  # noqa: A002
    """Write an audit event. It contains only the host of the URL, because the rest may be secret."""
    about = {"name": row.name, "host": urlsplit(row.url).hostname, "event_types": row.event_types, **more}
    log.note(session, type, now=now, object_id=row.id, project_id=row.project_id, details=about)


def disable(session: Session, endpoint: WebhookEndpoint, *, reason: str, now: float) -> None:
    """Disable an endpoint, which the caller has locked, until a user enables it.

    Its pending deliveries fail, and can be replayed.
    """
    endpoint.disabled_at, endpoint.disabled_reason = now, reason
    fail_pending(session, endpoint.id, now=now)


def fail_pending(session: Session, endpoint_id: str, *, now: float) -> None:
    waiting = (WebhookDelivery.endpoint_id == endpoint_id, WebhookDelivery.next_try_at.is_not(None))
    ended = {"status": "failed", "next_try_at": None, "ended_at": now}
    session.execute(update(WebhookDelivery).where(*waiting).values(ended))


def find(
    session: Session, *, project_id: str, endpoint_id: str, lock: bool = False, include_deleted: bool = False
) -> WebhookEndpoint:
    """Return the endpoint. Its lock does not block transactions that insert deliveries. Raises NotFound."""
    wanted = select(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id, WebhookEndpoint.project_id == project_id)
    row = session.scalar(wanted.with_for_update(key_share=True) if lock else wanted)
    if row is None or (row.deleted_at is not None and not include_deleted):
        raise NotFound("webhook_endpoint_not_found", endpoint_id=endpoint_id)
    return row


def _has_url(row: WebhookEndpoint, url: str, pepper: Pepper) -> bool:
    try:
        return signing.get(row, peppers=pepper.all()) == url
    except signing.UrlLost:
        return False


def _distinct(event_types: Sequence[EventType]) -> list[EventType]:
    return sorted(set(event_types))


def _too_many() -> Conflict:
    return Conflict("too_many_webhook_endpoints", max_endpoints=MAX_ENDPOINTS)
