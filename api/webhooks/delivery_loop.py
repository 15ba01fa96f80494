"""Sends the webhooks in the outbox: claims endpoints with due deliveries, and records the result of each attempt.

No transaction is open while a request is in progress.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from functools import partial

from starlette.concurrency import run_in_threadpool

from api.background.task_loop import TaskLoop
from api.telemetry import Telemetry
from api.webhooks.http_sender import WebhookSender
from catalog.db.database import Database
from catalog.pepper import Pepper
from catalog.webhooks import delivery_queue, signing
from catalog.webhooks.delivery_queue import DeliveryResult, Outgoing, Turn

LOOK_SECONDS = 1.0
FINISH_SECONDS = 5.0
"""Time that running requests have to finish at shutdown. Aborted ones are sent again."""
MAX_ENDPOINTS = 16
"""To how many endpoints one process sends at the same time."""
MAX_ENDPOINTS_OF_PROJECT = MAX_ENDPOINTS // 4
"""How many of them can belong to one project."""


class WebhookDeliverer(TaskLoop[Turn]):
    def __init__(self, db: Database, sender: WebhookSender, *, pepper: Pepper, telemetry: Telemetry) -> None:
        super().__init__("webhooks", finish_seconds=FINISH_SECONDS)
        self._db, self._sender, self._pepper, self._telemetry = db, sender, pepper, telemetry

    @property
    def most(self) -> int:
        return MAX_ENDPOINTS

    @property
    def look_seconds(self) -> float:
        return LOOK_SECONDS

    async def claim(self) -> Turn | None:
        numbers = Counter(turn.project_id for turn in self.claims)
        full = [project_id for project_id, number in numbers.items() if number >= MAX_ENDPOINTS_OF_PROJECT]
        return await run_in_threadpool(partial(delivery_queue.claim, self._db, pepper=self._pepper, full_projects=full))

    async def work(self, claimed: Turn) -> None:
        """Send the deliveries of a turn at the same time."""
        await asyncio.gather(*map(self._deliver, claimed.deliveries))
        await run_in_threadpool(delivery_queue.release, self._db, claimed)

    async def _deliver(self, outgoing: Outgoing) -> None:
        outcome = await self._try(outgoing)
        self._telemetry.count_try(is_delivered=outcome.is_success)
        await run_in_threadpool(delivery_queue.record, self._db, outgoing, outcome)

    async def _try(self, outgoing: Outgoing) -> DeliveryResult:
        if not outgoing.signed_with:
            lost = signing.SecretLost(outgoing.endpoint_id)
            return DeliveryResult(started_at=time.time(), seconds=0.0, error=lost.sentence())
        if outgoing.url is None:
            lost = signing.UrlLost(outgoing.endpoint_id)
            return DeliveryResult(started_at=time.time(), seconds=0.0, error=lost.sentence())
        headers = signing.headers(
            outgoing.body, message_id=outgoing.message_id, at=time.time(), signed_with=outgoing.signed_with
        )
        return await self._sender.send(
            outgoing.url, project_id=outgoing.project_id, body=outgoing.body, headers=headers
        )
