"""What the api does besides answering: it ends expired leases, advances sweeps, seals and anchors the audit log,
rings where something waits, and deletes what nothing names any more."""

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
from catalog.lifecycle import deadlines, recovery
from catalog.maintenance import audit_anchors
from catalog.maintenance.garbage_collection import clean
from catalog.queue import pending
from catalog.sweeps import controller
from catalog.webhooks import delivery_log, sealed_urls

log = logging.getLogger("lorry.api")

FIRST_CLEANING_SECONDS = 600.0
CLEANING_SECONDS = 24 * 3600.0
RESTART_SECONDS = 1.0
"""Between a crash of a background task and its restart."""
ANCHOR_SECONDS = 3600.0
"""Between two looks for this day's anchor of the audit chain."""
SEALED_AT_MOST = 10_000
"""Events in one look: after an upgrade that clears the seals, the other duties go on meanwhile."""
TASKS = ("streams", "duties", "sweeps", "anchors", "cleaning", "webhooks")
"""Background tasks, by the names under which their restarts are counted."""
Run = Callable[[], Awaitable[None]]
DUTIES = (
    "recover",
    "advance_sweeps",
    "seal_audit_log",
    "anchor",
    "notify_missed_deadlines",
    "wake_workers",
    "collect_garbage",
)
"""By the names under which their runs are counted."""
MAX_STEPS = 20
"""Of sweeps, in one look."""


async def keep_running(
    name: str, run: Run, telemetry: Telemetry, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> None:
    """Run a task until it returns. One that crashes is logged, counted and started again: without it live streams
    would stop, or revoked keys would keep theirs."""
    while True:
        try:
            await run()
        except Exception:  # whatever it is, the process keeps the task
            log.exception("crash in the background task %s", name)
            telemetry.count_restart(name)
        else:
            return
        await sleep(RESTART_SECONDS)


async def keep_order(services: Services) -> None:
    """Look four times a lease, for ever. (More rarely would look like an outage to recovery.)"""
    while True:
        await asyncio.sleep(services.settings.lease_seconds / 4)
        await run_in_threadpool(look_once, services)


async def keep_sweeps(services: Services) -> None:
    """Advance sweeps soon after a trial has ended, for ever. Workers don't: they may not create jobs."""
    while True:
        await asyncio.sleep(services.settings.poll_seconds)
        await run_in_threadpool(advance_once, services)


async def keep_anchored(services: Services) -> None:
    """Anchor the audit chain in the store, once a day, for ever."""
    while True:
        await run_in_threadpool(anchor_once, services)
        await asyncio.sleep(ANCHOR_SECONDS)


async def keep_clean(services: Services) -> None:
    """Clean the store soon after the start, then once a day. Several apis cleaning at once do no harm."""
    await asyncio.sleep(FIRST_CLEANING_SECONDS)
    while True:
        await run_in_threadpool(clean_once, services)
        await asyncio.sleep(CLEANING_SECONDS)


def look_once(services: Services) -> None:
    """One act that fails keeps none of the others from running."""
    for act in (_recover, _seal_audit_log, _notify_missed_deadlines, _wake_workers):
        _run(act, services)


def advance_once(services: Services) -> None:
    _run(_advance_sweeps, services)


def anchor_once(services: Services) -> None:
    _run(_anchor, services)


def _run(act: Callable[[Services], None], services: Services) -> None:
    duty, is_done = act.__name__.strip("_"), False
    try:
        act(services)
        is_done = True
    except (Unavailable, PepperReplaced) as error:
        log.warning("%s code=%s", duty, error.code)
    except Exception:  # the loop outlives whatever one run meets
        log.exception("crash in %s", duty)
    services.telemetry.count_run(duty, is_done=is_done)


def _recover(services: Services) -> None:
    num_ended = recovery.expire(services.db, lease_seconds=services.settings.lease_seconds)
    if num_ended:
        log.warning("recovered jobs=%d", num_ended)


def _advance_sweeps(services: Services) -> None:
    if controller.advance_some(services.db, most=MAX_STEPS):
        services.doorbell.ring()  # new trials have files to prepare


def _seal_audit_log(services: Services) -> None:
    chain.seal(services.db, pepper=services.pepper.current, at_most=SEALED_AT_MOST)


def _anchor(services: Services) -> None:
    audit_anchors.anchor(services.db, services.store.objects, pepper=services.pepper.current)


def _notify_missed_deadlines(services: Services) -> None:
    deadlines.tell_late(services.db)


def _wake_workers(services: Services) -> None:
    if pending.has_work(services.db):
        services.doorbell.ring()


def clean_once(services: Services) -> None:
    is_done = False
    try:
        sealed_urls.seal_all(services.db, peppers=services.pepper.all())
        num_deleted = clean(services.db, services.store)
        delivery_log.forget(services.db)
        log.info("cleaned objects=%d", num_deleted)
        is_done = True
    except LorryError as error:
        log.warning("cleaning code=%s: %s", error.code, error)
    except Exception:  # nothing was lost; the next one tries again
        log.exception("crash in the cleaning")
    services.telemetry.count_run("collect_garbage", is_done=is_done)
