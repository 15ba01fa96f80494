"""Sends the webhooks in the outbox: claims due deliveries, a few per endpoint and project at a time, and records the
result of each attempt.

Every API server runs this loop; they share the work by claims. No transaction is open while a request is in progress.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

from starlette.concurrency import run_in_threadpool

from api.telemetry import Telemetry
from api.webhooks.http_sender import WebhookSender
from catalog.db.database import Database
from catalog.errors import LorryError
from catalog.pepper import Pepper
from catalog.webhooks import delivery_queue, sealed_urls, signing
from catalog.webhooks.delivery_queue import DeliveryResult, Outgoing

LOOK_SECONDS = 1.0
CLOSE_SECONDS = 5.0
"""Time that running requests have to finish at shutdown. Aborted ones are sent again."""
log = logging.getLogger("lorry.api")


class WebhookDeliverer:
    def __init__(self, db: Database, sender: WebhookSender, *, pepper: Pepper, telemetry: Telemetry) -> None:
        self._db, self._sender, self._pepper, self._telemetry = db, sender, pepper, telemetry
        self._in_flight: dict[str, Outgoing] = {}
        """Requests in progress, by delivery."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake_up = asyncio.Event()

    def wake(self) -> None:
        """Signal that there may be a delivery to send. May be called from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake_up.set)

    async def run(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            while True:
                await self._poll()
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await self._wake_up.wait()
                self._wake_up.clear()
        finally:
            await self._end()

    async def _poll(self) -> None:
        limit = delivery_queue.MAX_IN_FLIGHT - len(self._tasks)
        if limit <= 0:
            return
        try:
            claimed = await run_in_threadpool(
                delivery_queue.claim,
                self._db,
                pepper=self._pepper,
                limit=limit,
                in_flight=list(self._in_flight.values()),
            )
        except LorryError as error:
            log.warning("webhooks code=%s", error.code)
            return
        except Exception:  # the loop must survive any failure of one poll
            log.exception("crash in webhooks")
            return
        for outgoing in claimed:
            self._in_flight[outgoing.delivery_id] = outgoing
            task = asyncio.create_task(self._deliver(outgoing))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _deliver(self, outgoing: Outgoing) -> None:
        try:
            outcome = await self._try(outgoing)
            self._telemetry.count_try(is_delivered=outcome.is_success)
            await run_in_threadpool(delivery_queue.record, self._db, outgoing, outcome)
        except LorryError as error:  # the delivery is sent again when its claim has expired
            log.warning("webhooks delivery=%s code=%s", outgoing.delivery_id, error.code)
        except Exception:
            log.exception("crash in the webhook delivery %s", outgoing.delivery_id)
        finally:
            del self._in_flight[outgoing.delivery_id]
            self._wake_up.set()

    async def _try(self, outgoing: Outgoing) -> DeliveryResult:
        if not outgoing.signed_with:
            lost = signing.SecretLost(outgoing.endpoint_id)
            return DeliveryResult(started_at=time.time(), seconds=0.0, error=lost.sentence())
        if outgoing.url is None:
            lost = sealed_urls.UrlLost(outgoing.endpoint_id)
            return DeliveryResult(started_at=time.time(), seconds=0.0, error=lost.sentence())
        headers = signing.headers(
            outgoing.body, message_id=outgoing.message_id, at=time.time(), signed_with=outgoing.signed_with
        )
        return await self._sender.send(
            outgoing.url, project_id=outgoing.project_id, body=outgoing.body, headers=headers
        )

    async def _end(self) -> None:
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=CLOSE_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
