"""What the api does besides answering: it ends expired leases, and rings where something waits."""

from __future__ import annotations

import asyncio
import logging

from starlette.concurrency import run_in_threadpool

from api.deps import Services
from catalog import queue, recovery
from catalog.errors import LorryError

log = logging.getLogger("lorry.api")


async def keep_order(services: Services) -> None:
    """Look four times a lease, for ever. (More rarely would look like an outage to recovery.)"""
    while True:
        await asyncio.sleep(services.settings.lease_seconds / 4)
        await run_in_threadpool(look_once, services)


def look_once(services: Services) -> None:
    try:
        num_ended = recovery.expire(services.db, grace_seconds=services.settings.lease_seconds)
        if num_ended:
            log.warning("recovered jobs=%d", num_ended)
        if queue.has_work(services.db):
            services.doorbell.ring()
    except LorryError as error:
        log.warning("recovery code=%s", error.code)
    except Exception:  # this loop outlives whatever one look meets
        log.exception("crash in recovery")
