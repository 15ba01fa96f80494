"""Background tasks of the API server: expire leases and inference requests, report deadlines that will be missed,
advance sweeps, seal and anchor the audit log, wake workers, and delete objects that nothing references."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from starlette.concurrency import run_in_threadpool

from api.deps import Services
from api.telemetry import Telemetry
from catalog.audit import chain
from catalog.audit.derived_keys import PepperReplaced
from catalog.errors import LorryError, Unavailable
from catalog.inference import requests
from catalog.lifecycle import deadlines, recovery
from catalog.maintenance import audit_anchors
from catalog.maintenance.garbage_collection import clean
from catalog.queue import pending
from catalog.serving import endpoints
from catalog.sweeps import controller
from catalog.webhooks import delivery_log, sealed_urls

log = logging.getLogger("lorry.api")

FIRST_CLEANING_SECONDS = 600.0
CLEANING_SECONDS = 24 * 3600.0
RESTART_SECONDS = 1.0
"""Delay between a crash of a background task and its restart."""
ANCHOR_SECONDS = 3600.0
"""Interval of the checks that today's anchor of the audit chain exists."""
SEALED_AT_MOST = 10_000
"""Maximum number of events sealed in one run, so that an upgrade that clears all seals does not delay other tasks."""
LOOPS = (
    *("streams", "periodic_tasks", "sweeps", "anchors", "garbage_collection"),
    *("webhooks", "batches", "serving"),
)
"""Names of the long-running background tasks, under which their restarts are counted."""
Run = Callable[[], Awaitable[None]]
PERIODIC_TASKS = (
    "recover",
    "expire_inference_requests",
    "advance_sweeps",
    "seal_audit_log",
    "anchor",
    "notify_missed_deadlines",
    "wake_workers",
    "collect_garbage",
)
"""Names of the periodic runs, under which their results are counted."""
MAX_STEPS = 20
"""Maximum number of steps of sweeps in one run."""


async def keep_running(
    name: str, run: Run, telemetry: Telemetry, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> None:
    """Run a task until it returns. A task that crashes is logged, counted and restarted: otherwise live streams would
    stop, or revoked keys would keep their streams."""
    while True:
        try:
            await run()
        except Exception:  # any crash: the task must keep running as long as the process
            log.exception("crash in the background task %s", name)
            telemetry.count_restart(name)
        else:
            return
        await sleep(RESTART_SECONDS)


async def run_periodic_tasks(services: Services) -> None:
    """Run the periodic work four times per lease duration. At longer intervals, recovery would assume an outage."""
    while True:
        await asyncio.sleep(services.settings.lease_seconds / 4)
        await run_in_threadpool(run_once, services)


async def keep_sweeps(services: Services) -> None:
    """Advance sweeps soon after a trial has ended. Workers can't do this: they may not create jobs."""
    while True:
        await asyncio.sleep(services.settings.poll_seconds)
        await run_in_threadpool(advance_once, services)


async def keep_anchored(services: Services) -> None:
    """Anchor the audit chain in the store once a day."""
    while True:
        await run_in_threadpool(anchor_once, services)
        await asyncio.sleep(ANCHOR_SECONDS)


async def keep_clean(services: Services) -> None:
    """Collect garbage in the store 10 minutes after the start, then daily. Several API servers may do so at once."""
    await asyncio.sleep(FIRST_CLEANING_SECONDS)
    while True:
        await run_in_threadpool(clean_once, services)
        await asyncio.sleep(CLEANING_SECONDS)


def run_once(services: Services) -> None:
    """Run each action. A failing action does not prevent the others."""
    for act in (_recover, _expire_inference_requests, _seal_audit_log, _notify_missed_deadlines, _wake_workers):
        _run(act, services)


def advance_once(services: Services) -> None:
    _run(_advance_sweeps, services)


def anchor_once(services: Services) -> None:
    _run(_anchor, services)


def _run(act: Callable[[Services], None], services: Services) -> None:
    task, succeeded = act.__name__.strip("_"), False
    try:
        act(services)
        succeeded = True
    except (Unavailable, PepperReplaced) as error:
        log.warning("%s code=%s", task, error.code)
    except Exception:  # the loop must survive any failure of one run
        log.exception("crash in %s", task)
    services.telemetry.count_run(task, is_done=succeeded)


def _recover(services: Services) -> None:
    num_ended = recovery.expire(services.db, lease_seconds=services.settings.lease_seconds)
    if num_ended:
        log.warning("recovered jobs=%d", num_ended)


def _expire_inference_requests(services: Services) -> None:
    num_expired = requests.remove_expired(services.db)
    if num_expired:
        log.warning("expired inference_requests=%d", num_expired)


def _advance_sweeps(services: Services) -> None:
    if controller.advance_some(services.db, most=MAX_STEPS):
        services.notifier.wake_workers()  # new trials have files to prepare


def _seal_audit_log(services: Services) -> None:
    chain.seal(services.db, pepper=services.pepper.current, at_most=SEALED_AT_MOST)


def _anchor(services: Services) -> None:
    audit_anchors.anchor(services.db, services.store.objects, pepper=services.pepper.current)


def _notify_missed_deadlines(services: Services) -> None:
    deadlines.notify_late(services.db)


def _wake_workers(services: Services) -> None:
    if pending.has_work(services.db):
        services.notifier.wake_workers()


def clean_once(services: Services) -> None:
    succeeded = False
    try:
        sealed_urls.seal_all(services.db, peppers=services.pepper.all())
        endpoints.seal_all(services.db, peppers=services.pepper.all())
        num_deleted = clean(services.db, services.store)
        delivery_log.forget(services.db)
        log.info("cleaned objects=%d", num_deleted)
        succeeded = True
    except LorryError as error:
        log.warning("cleaning code=%s: %s", error.code, error)
    except Exception:  # deletion is idempotent: the next run retries it
        log.exception("crash in the cleaning")
    services.telemetry.count_run("collect_garbage", is_done=succeeded)
