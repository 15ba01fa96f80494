"""Starts the background work of an API server, keeps it running, and stops it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

from starlette.concurrency import run_in_threadpool

from api.background.periodic import PERIODIC, Periodic
from api.deps import Services
from api.telemetry import Telemetry

RESTART_SECONDS = 1.0
"""Delay between a crash of a loop and its restart."""
LOOPS = ("streams", "webhooks", "batches", "serving")
"""Names of the loops, under which their restarts are counted. Each runs until it is cancelled."""
Run = Callable[[], Awaitable[None]]
log = logging.getLogger("lorry.api")


@asynccontextmanager
async def background_work(services: Services) -> AsyncGenerator[None]:
    """Run the periodic actions and the loops while the block runs."""
    loops: Mapping[str, Run] = {
        "streams": services.feed.run,
        "webhooks": services.deliverer.run,
        "batches": services.batches.run,
        "serving": services.keepers.run,
    }
    runs = [keep_running(name, loops[name], services.telemetry) for name in LOOPS]
    tasks = [asyncio.create_task(run) for run in (*runs, *(_repeat(each, services) for each in PERIODIC))]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def keep_running(
    name: str, run: Run, telemetry: Telemetry, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> None:
    """Run a loop until it returns. A loop that crashes is logged, counted and restarted: otherwise live streams would
    stop, or revoked keys would keep their streams."""
    while True:
        try:
            await run()
        except Exception:  # any crash: the loop must keep running as long as the process
            log.exception("crash in the background task %s", name)
            telemetry.count_restart(name)
        else:
            return
        await sleep(RESTART_SECONDS)


async def _repeat(periodic: Periodic, services: Services) -> None:
    seconds = periodic.seconds(services.settings)
    await asyncio.sleep(seconds if periodic.first_seconds is None else periodic.first_seconds)
    while True:
        await run_in_threadpool(periodic.run, services)
        await asyncio.sleep(seconds)
