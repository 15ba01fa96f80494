"""A webhook endpoint for tests, with helpers for its deliveries."""

from __future__ import annotations

from typing import Any

from catalog.jobs import commands
from catalog.tables.webhooks import WebhookDelivery, WebhookEndpoint
from catalog.webhooks import delivery_log, delivery_queue, endpoints
from catalog.webhooks.delivery_queue import DeliveryResult, Outgoing, Turn
from catalog.webhooks.outbox import EVENT_TYPES, EventType
from tests.catalog.world import PEPPER, World

OK = DeliveryResult(started_at=1.0, seconds=0.1, status_code=204, reply="")
BAD = DeliveryResult(started_at=1.0, seconds=0.1, status_code=503, reply="busy")


class Hooks:
    """The endpoint of a test and its deliveries."""

    def __init__(self, world: World, *event_types: EventType) -> None:
        self.world, self.db = world, world.db
        self.owner: dict[str, Any] = {"project_id": world.caller.project_id}
        self.row, self.secret = self.more(*event_types)
        self.turns: list[Turn] = []
        """Turns that have not ended."""

    def more(self, *event_types: EventType, url: str = "https://example.com/") -> tuple[WebhookEndpoint, str]:
        wanted = event_types or EVENT_TYPES
        return endpoints.create(self.db, **self.owner, name="ops", url=url, event_types=wanted, pepper=PEPPER)

    @property
    def ident(self) -> dict[str, Any]:
        return {**self.owner, "endpoint_id": self.row.id}

    def claim(self) -> list[Outgoing]:
        """Claim all endpoints with due deliveries. Returns the deliveries of their turns."""
        claimed: list[Turn] = []
        while (turn := delivery_queue.claim(self.db, pepper=PEPPER)) is not None:
            claimed.append(turn)
        self.turns += claimed
        return [outgoing for turn in claimed for outgoing in turn.deliveries]

    def end_turns(self) -> None:
        while self.turns:
            delivery_queue.release(self.db, self.turns.pop())

    def send(self, outcome: DeliveryResult) -> list[Outgoing]:
        """Attempt all due deliveries, until none is left. Returns them."""
        sent: list[Outgoing] = []
        while (turn := delivery_queue.claim(self.db, pepper=PEPPER)) is not None:
            for outgoing in turn.deliveries:
                delivery_queue.record(self.db, outgoing, outcome)
            delivery_queue.release(self.db, turn)
            sent += turn.deliveries
        return sent

    def end_job(self) -> str:
        job = self.world.submit()
        commands.cancel(self.db, **self.world.of(job.id))
        return job.id

    def all(self, **filters: Any) -> list[WebhookDelivery]:
        return delivery_log.list_page(self.db, **self.ident, limit=100, **filters).items

    def endpoint(self) -> WebhookEndpoint:
        return endpoints.get(self.db, **self.ident)

    def fail_until_it_ends(self, outcome: DeliveryResult = BAD) -> list[str]:
        """Attempt all deliveries until none is due, advancing the clock. Returns the message id of each attempt."""
        tried: list[str] = []
        while any(row.next_try_at for row in self.all()):
            self.world.clock.now = max(self.world.clock.now, *(row.next_try_at or 0.0 for row in self.all()))
            tried += [outgoing.message_id for outgoing in self.send(outcome)]
        return tried
