"""Claims due webhook deliveries, and records the results of attempts.

A delivery is leased for a short time, so that another process takes over after a crash. No transaction is open while a
delivery is sent. Several processes send different deliveries at the same time.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Select, and_, func, or_, select
from sqlalchemy.orm import Session

from catalog.db import lease
from catalog.db.database import Database, read_clock, skip_locked
from catalog.pepper import Pepper
from catalog.tables.table import new_id
from catalog.tables.webhooks import WebhookDelivery, WebhookEndpoint, WebhookTry
from catalog.webhooks import endpoints, outbox, sealed_urls, signing
from catalog.webhooks.outbox import EventType

DELIVERY_LEASE_SECONDS = 60.0
"""Lease of a claimed delivery, much longer than an attempt takes."""
MAX_IN_FLIGHT = 64
"""How many deliveries one process sends at the same time."""
OF_PROJECT = MAX_IN_FLIGHT // 4
"""How many of them can be for one project."""
AT_ONCE = 4
"""How many deliveries are sent to one endpoint at the same time; 1 while it fails."""
FAILING_SECONDS = 5 * 86_400.0
"""An endpoint is disabled after all attempts have failed for this long."""
GONE = 410


@dataclass(frozen=True, kw_only=True, slots=True)
class Outgoing:
    """A delivery that this process has claimed and sends."""

    delivery_id: str
    claim_id: str
    endpoint_id: str
    project_id: str
    url: str | None
    """None if the URL can't be decrypted any more."""
    message_id: str
    body: bytes
    signed_with: list[str]
    """Secrets to sign with; empty if they can't be recreated any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeliveryResult:
    """Result of one delivery attempt."""

    started_at: float
    seconds: float
    status_code: int | None = None
    error: str | None = None
    """Why there was no response, as a sentence."""
    reply: str | None = None
    retry_after: float | None = None
    concerns_endpoint: bool = True
    """False: the attempt failed before a connection because this service was too busy to resolve the host name."""

    @property
    def is_success(self) -> bool:
        return self.status_code is not None and 200 <= self.status_code < 300


def claim(db: Database, *, pepper: Pepper, limit: int, in_flight: Collection[Outgoing]) -> list[Outgoing]:
    """Claim up to `limit` due deliveries. in_flight: the deliveries that this process is sending.

    An endpoint has at most AT_ONCE of them, so that a slow endpoint delays only itself, and a project at most
    OF_PROJECT. The project with the fewest is next, and among equal ones the project with the longest due delivery.
    """
    by_endpoint = Counter(outgoing.endpoint_id for outgoing in in_flight)
    by_project = Counter(outgoing.project_id for outgoing in in_flight)
    full = [endpoint_id for endpoint_id, number in by_endpoint.items() if number >= AT_ONCE]
    full_projects = [project_id for project_id, number in by_project.items() if number >= OF_PROJECT]
    waiting: dict[str, deque[tuple[str, bool]]] = {}
    with db.read() as session:
        now = read_clock(session)
        if session.scalar(_any_due(now, full, full_projects)) is None:
            return []
        due_endpoints = _due_endpoints(now, full, full_projects, busy=list(by_endpoint))
        for endpoint_id, project_id, is_failing in session.execute(due_endpoints):
            waiting.setdefault(project_id, deque()).append((endpoint_id, is_failing))
    found: list[Outgoing] = []
    while waiting and len(found) < limit:
        project_id = min(waiting, key=lambda one: by_project[one])
        endpoint_id, is_failing = waiting[project_id].popleft()
        free = (1 if is_failing else AT_ONCE) - by_endpoint[endpoint_id]
        number = min(free, OF_PROJECT - by_project[project_id], limit - len(found))
        claimed = _claim_of(db, endpoint_id, number, pepper=pepper) if number > 0 else []
        found += claimed
        by_project[project_id] += len(claimed)
        if not waiting[project_id] or by_project[project_id] >= OF_PROJECT:
            del waiting[project_id]
    return found


def record(db: Database, claimed: Outgoing, outcome: DeliveryResult) -> None:
    """Store an attempt, and finish the delivery or schedule its next attempt.

    If the process has lost the lease of the delivery, only the attempt is stored.
    """
    with db.write() as session:
        endpoint = _lock(session, claimed.endpoint_id)
        now = read_clock(session)
        add_try(session, claimed.delivery_id, outcome)
        delivery = lease.held(session, WebhookDelivery, claimed.claim_id)
        if delivery is None:
            return
        delivery.num_tries += 1
        lease.release(delivery)
        if outcome.is_success:
            delivery.status, delivery.next_try_at, delivery.ended_at = "delivered", None, now
            endpoint.failing_since = None
            return
        _reschedule(delivery, outcome, now=now)
        if outcome.concerns_endpoint:
            _check_endpoint(session, endpoint, outcome, now=now)


def add_try(session: Session, delivery_id: str, outcome: DeliveryResult) -> None:
    session.add(
        WebhookTry(
            delivery_id=delivery_id,
            started_at=outcome.started_at,
            seconds=outcome.seconds,
            status_code=outcome.status_code,
            error=outcome.error,
            reply=outcome.reply,
        )
    )


def record_test(db: Database, endpoint: WebhookEndpoint, delivery: WebhookDelivery, outcome: DeliveryResult) -> None:
    """Store a test delivery with its only attempt. The request that asked for the test has sent it."""
    with db.write() as session:
        now = read_clock(session)
        delivery.status, delivery.num_tries = "delivered" if outcome.is_success else "failed", 1
        delivery.created_at = delivery.ended_at = now
        session.add(delivery)
        session.flush()
        add_try(session, delivery.id, outcome)
        endpoints.note(session, endpoint, "webhook_endpoint.tested", now=now, status_code=outcome.status_code)


def new_test(endpoint: WebhookEndpoint, event_type: EventType, *, subject: str, now: float) -> WebhookDelivery:
    """Return the row of a test delivery, which is not stored yet."""
    return WebhookDelivery(
        id=new_id("delivery"),
        endpoint_id=endpoint.id,
        event_id=new_id("evt-test"),
        event_type=event_type,
        event_at=now,
        data={"id": subject},
        created_at=now,
        status="pending",
        is_test=True,
        num_tries=0,
        num_tries_before=0,
    )


def _any_due(now: float, full: list[str], full_projects: list[str]) -> Select[str]:
    due = select(WebhookDelivery.id).where(is_due(now), WebhookDelivery.endpoint_id.not_in(full))
    if full_projects:
        due = due.join(WebhookEndpoint, WebhookEndpoint.id == WebhookDelivery.endpoint_id)
        due = due.where(WebhookEndpoint.project_id.not_in(full_projects))
    return due.limit(1)


def is_due(now: float) -> ColumnElement[bool]:
    """In a query: the delivery is due, and no process has leased it."""
    return and_(WebhookDelivery.next_try_at <= now, lease.is_free(WebhookDelivery, now=now))


def _due_endpoints(now: float, full: list[str], full_projects: list[str], *, busy: list[str]) -> Select[str, str, bool]:
    """Select endpoints with due deliveries, their projects, and whether they fail; the longest due first.

    A failing endpoint is not selected while a delivery is being sent to it.
    """
    due = (WebhookDelivery.endpoint_id == WebhookEndpoint.id, is_due(now))
    first = select(func.min(WebhookDelivery.next_try_at)).where(*due).scalar_subquery()
    is_failing = WebhookEndpoint.failing_since.is_not(None)
    due_endpoints = select(WebhookEndpoint.id, WebhookEndpoint.project_id, is_failing).where(first.is_not(None))
    due_endpoints = due_endpoints.where(or_(~is_failing, WebhookEndpoint.id.not_in(busy)))
    is_open = (WebhookEndpoint.id.not_in(full), WebhookEndpoint.project_id.not_in(full_projects))
    return due_endpoints.where(*is_open).order_by(first)


def _claim_of(db: Database, endpoint_id: str, number: int, *, pepper: Pepper) -> list[Outgoing]:
    with db.write() as session:
        now = read_clock(session)
        endpoint = session.get_one(WebhookEndpoint, endpoint_id)
        if endpoint.disabled_at is not None or endpoint.deleted_at is not None:
            # The event was written while the endpoint was being disabled or deleted.
            endpoints.fail_pending(session, endpoint_id, now=now)
            return []
        due = select(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id, is_due(now))
        rows = session.scalars(skip_locked(due.order_by(WebhookDelivery.next_try_at).limit(number)))
        secrets = _secrets(endpoint, pepper, now=now)
        url = _url(endpoint, pepper)
        return [
            Outgoing(
                delivery_id=row.id,
                claim_id=lease.acquire(row, now=now, lease_seconds=DELIVERY_LEASE_SECONDS),
                endpoint_id=endpoint.id,
                project_id=endpoint.project_id,
                url=url,
                message_id=row.event_id,
                body=signing.body_of(row),
                signed_with=secrets,
            )
            for row in rows
        ]


def _url(endpoint: WebhookEndpoint, pepper: Pepper) -> str | None:
    try:
        return sealed_urls.get(endpoint, peppers=pepper.all())
    except sealed_urls.UrlLost:
        return None


def _secrets(endpoint: WebhookEndpoint, pepper: Pepper, *, now: float) -> list[str]:
    try:
        return signing.good(endpoint, pepper, now=now)
    except signing.SecretLost:
        return []


def _lock(session: Session, endpoint_id: str) -> WebhookEndpoint:
    wanted = select(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id)
    return session.scalars(wanted.with_for_update(key_share=True)).one()


def _reschedule(delivery: WebhookDelivery, outcome: DeliveryResult, *, now: float) -> None:
    """Schedule the next attempt, or fail the delivery if it has had all of them."""
    wait = wait_seconds(delivery.num_tries - delivery.num_tries_before, retry_after=outcome.retry_after)
    delivery.next_try_at = None if wait is None else now + wait
    if wait is None:
        delivery.status, delivery.ended_at = "failed", now


def _check_endpoint(session: Session, endpoint: WebhookEndpoint, outcome: DeliveryResult, *, now: float) -> None:
    """Disable an endpoint that responds with 410 (gone) or has failed for days, and notify the project's others."""
    endpoint.failing_since = since = now if endpoint.failing_since is None else endpoint.failing_since
    is_gone = outcome.status_code == GONE
    if not is_gone and since > now - FAILING_SECONDS:
        return
    if endpoint.disabled_at is None and endpoint.deleted_at is None:
        endpoints.disable(session, endpoint, reason="gone" if is_gone else "failing", now=now)
        outbox.endpoint_disabled(session, endpoint, now=now)
        endpoints.note(session, endpoint, "webhook_endpoint.disabled", now=now, reason=endpoint.disabled_reason)


WAITS_SECONDS = (5.0, 30.0, 120.0, 600.0, 1800.0, 3600.0, 7200.0, 14_400.0, 25_200.0, 36_000.0)
"""Waits after the first failed attempt, the second, …: in total about 25 hours."""
JITTER = 0.2
LONGEST_ASKED_SECONDS = 12 * 3600.0
"""Maximum wait that a Retry-After header can request."""


def wait_seconds(num_tries: int, *, retry_after: float | None = None, chance: float | None = None) -> float | None:
    """Return the wait after `num_tries` failed attempts, or None if there is no further one. chance: 0 to 1, for tests.

    A Retry-After only makes the wait longer. Otherwise a receiver could use it to request many attempts.
    """
    if not 0 < num_tries <= len(WAITS_SECONDS):
        return None
    spread = 1 + JITTER * (2 * (random.random() if chance is None else chance) - 1)  # noqa: S311  (no secret)
    own = WAITS_SECONDS[num_tries - 1] * spread
    return max(own, min(retry_after or 0.0, LONGEST_ASKED_SECONDS))
