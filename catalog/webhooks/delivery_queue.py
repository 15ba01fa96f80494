"""Claims endpoints with due webhook deliveries, and records the results of attempts.

An endpoint's task (catalog/tasks) is claimed for one turn, in which some of its due deliveries are sent. After a crash,
another process takes over when the lease expires. No transaction is open while a delivery is sent.

Lock order: endpoint, its task, delivery.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from catalog.db.database import Database, read_clock
from catalog.errors import StaleClaim
from catalog.pepper import Pepper
from catalog.tables.table import new_id
from catalog.tables.webhooks import WebhookDelivery, WebhookEndpoint, WebhookTry
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskClaim, TaskKind
from catalog.webhooks import endpoints, outbox, signing
from catalog.webhooks.outbox import EventType

TURN_LEASE_SECONDS = 60.0
"""Lease of a claimed endpoint, much longer than a turn takes."""
MAX_AT_ONCE = 4
"""How many deliveries are sent to one endpoint at the same time; 1 while it fails."""
FAILING_SECONDS = 5 * 86_400.0
"""An endpoint is disabled after all attempts have failed for this long."""
GONE = 410


@dataclass(frozen=True, kw_only=True, slots=True)
class Outgoing:
    """A delivery that this process sends."""

    task: TaskClaim
    """The claim of its endpoint."""
    delivery_id: str
    endpoint_id: str
    project_id: str
    url: str | None
    """None if the URL can't be decrypted any more."""
    message_id: str
    body: bytes
    signed_with: list[str]
    """Secrets to sign with; empty if they can't be recreated any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """An endpoint that this process has claimed, and the deliveries to send to it at the same time."""

    task: TaskClaim
    project_id: str
    deliveries: tuple[Outgoing, ...]


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


def claim(db: Database, *, pepper: Pepper, full_projects: Collection[str] = ()) -> Turn | None:
    """Claim the next endpoint with due deliveries. Returns None if there is none. The projects take turns.

    A slow endpoint delays only itself. full_projects: projects to which this process sends as much as it may.
    """
    while True:
        task = task_queue.claim(
            db, [TaskKind.WEBHOOK], lease_seconds=TURN_LEASE_SECONDS, skipping_projects=full_projects
        )
        if task is None:
            return None
        with db.write() as session:
            endpoint = _lock(session, task.subject)
            task_queue.hold_task(session, task)
            deliveries = _due(session, endpoint, task, pepper=pepper)
            if deliveries:
                return Turn(task=task, project_id=endpoint.project_id, deliveries=deliveries)
            _end_turn(session, task)


def release(db: Database, turn: Turn) -> None:
    """End the turn. The endpoint's next turn begins when its next delivery is due. Raises StaleClaim."""
    with db.write() as session:
        _lock(session, turn.task.subject)
        _end_turn(session, turn.task)


def record(db: Database, sent: Outgoing, outcome: DeliveryResult) -> None:
    """Store an attempt, and finish the delivery or schedule its next attempt.

    If the process has lost the endpoint's lease, or the endpoint was disabled, only the attempt is stored.
    """
    with db.write() as session:
        endpoint = _lock(session, sent.endpoint_id)
        now = read_clock(session)
        add_try(session, sent.delivery_id, outcome)
        try:
            task_queue.hold_task(session, sent.task)
        except StaleClaim:
            return
        delivery = session.get_one(WebhookDelivery, sent.delivery_id, with_for_update=True)
        if delivery.next_try_at is None:
            return
        delivery.num_tries += 1
        if outcome.is_success:
            delivery.status, delivery.next_try_at, delivery.ended_at = "delivered", None, now
            endpoint.failing_since = None
            return
        _reschedule(delivery, outcome, now=now)
        if not outcome.concerns_endpoint:
            return
        endpoint.failing_since = since = now if endpoint.failing_since is None else endpoint.failing_since
    if outcome.status_code == GONE or since <= now - FAILING_SECONDS:
        _disable(db, sent.endpoint_id, reason="gone" if outcome.status_code == GONE else "failing")


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


def _due(session: Session, endpoint: WebhookEndpoint, task: TaskClaim, *, pepper: Pepper) -> tuple[Outgoing, ...]:
    """Return the endpoint's next due deliveries."""
    now = read_clock(session)
    if endpoint.disabled_at is not None or endpoint.deleted_at is not None:
        # The event was written while the endpoint was being disabled or deleted.
        endpoints.fail_pending(session, endpoint.id, now=now)
        return ()
    of_endpoint = (WebhookDelivery.endpoint_id == endpoint.id, WebhookDelivery.next_try_at <= now)
    number = MAX_AT_ONCE if endpoint.failing_since is None else 1
    due = select(WebhookDelivery).where(*of_endpoint).order_by(WebhookDelivery.next_try_at, WebhookDelivery.id)
    secrets, url = _secrets(endpoint, pepper, now=now), _url(endpoint, pepper)
    return tuple(
        Outgoing(
            task=task,
            delivery_id=row.id,
            endpoint_id=endpoint.id,
            project_id=endpoint.project_id,
            url=url,
            message_id=row.event_id,
            body=signing.body_of(row),
            signed_with=secrets,
        )
        for row in session.scalars(due.limit(number))
    )


def _end_turn(session: Session, task: TaskClaim) -> None:
    """Release the task until the next delivery of the endpoint is due, or delete it if none is pending."""
    pending = WebhookDelivery.endpoint_id == task.subject, WebhookDelivery.next_try_at.is_not(None)
    task_queue.hold_task(session, task)  # a delivery that is added later makes the task due
    next_try_at = session.scalar(select(func.min(WebhookDelivery.next_try_at)).where(*pending))
    if next_try_at is None:
        task_queue.finish(session, task)
    else:
        task_queue.release_in(session, task, wait_seconds=max(0.0, next_try_at - read_clock(session)))


def _url(endpoint: WebhookEndpoint, pepper: Pepper) -> str | None:
    try:
        return signing.get(endpoint, peppers=pepper.all())
    except signing.UrlLost:
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


def _disable(db: Database, endpoint_id: str, *, reason: str) -> None:
    """Disable an endpoint, and notify the project's others.

    This transaction holds no task, because it waits for those of the other endpoints.
    """
    with db.write() as session:
        endpoint, now = _lock(session, endpoint_id), read_clock(session)
        if endpoint.disabled_at is None and endpoint.deleted_at is None:
            endpoints.disable(session, endpoint, reason=reason, now=now)
            outbox.endpoint_disabled(session, endpoint, now=now)
            endpoints.note(session, endpoint, "webhook_endpoint.disabled", now=now, reason=reason)


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
