"""The periodic actions of an API server: expire leases, forget base models that no request waits for, report deadlines
that will be missed, advance sweeps, seal and anchor the audit log, wake workers, and delete objects that nothing
references.

Every API server runs them, so each action must be safe while another process runs it. `background_work` starts all
background work of an API server, keeps it running, and stops it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool

from api.deps import Services
from api.telemetry import Telemetry
from catalog.audit import chain
from catalog.audit.derived_keys import PepperReplaced
from catalog.errors import OutOfSpace, Unavailable
from catalog.inference import engines
from catalog.lifecycle import deadlines, recovery
from catalog.maintenance import audit_anchors
from catalog.maintenance.garbage_collection import clean
from catalog.queue import notifier
from catalog.serving import endpoints
from catalog.settings import Settings
from catalog.sweeps import controller
from catalog.webhooks import delivery_log, signing

log = logging.getLogger("lorry.api")

SEALED_AT_MOST = 10_000
"""Maximum number of events sealed in one run, so that an upgrade that clears all seals does not take minutes."""
MAX_STEPS = 20
"""Maximum number of steps of sweeps in one run."""
RESTART_SECONDS = 1.0
"""Delay between a crash of a loop and its restart."""
LOOPS = ("streams", "webhooks", "batches", "serving")
"""Names of the loops, under which their restarts are counted. Each runs until it is cancelled."""
Run = Callable[[], Awaitable[None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Periodic:
    """An action that runs in a thread, again and again."""

    name: str
    """Its runs are counted under this name."""
    act: Callable[[Services], None]
    seconds: Callable[[Settings], float]
    """Time between the end of a run and the next."""
    first_seconds: float | None = None
    """Time before the first run. None: as before the others."""

    def run(self, services: Services) -> None:
        """Run the action once. Its failure is logged and counted, never raised."""
        is_done = False
        try:
            self.act(services)
            is_done = True
        except (Unavailable, OutOfSpace, PepperReplaced) as error:
            log.warning("%s code=%s: %s", self.name, error.code, error)
        except Exception:  # the next run may succeed
            log.exception("crash in %s", self.name)
        services.telemetry.count_run(self.name, is_done=is_done)


def _recover(services: Services) -> None:
    num_ended = recovery.expire(services.db, lease_seconds=services.settings.lease_seconds)
    if num_ended:
        log.warning("recovered jobs=%d", num_ended)
        _wake_workers(services)


def _forget_wanted_bases(services: Services) -> None:
    engines.remove_lapsed(services.db)


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
    if notifier.has_work(services.db):
        services.notifier.wake_workers()


def _collect_garbage(services: Services) -> None:
    signing.seal_all(services.db, peppers=services.pepper.all())
    endpoints.seal_all(services.db, peppers=services.pepper.all())
    num_deleted = clean(services.db, services.store)
    delivery_log.forget(services.db)
    log.info("cleaned objects=%d", num_deleted)


def _often(settings: Settings) -> float:
    """At longer intervals, recovery would assume an outage of the database."""
    return settings.lease_seconds / 4


PERIODIC = (
    Periodic(name="recover", act=_recover, seconds=_often),
    Periodic(name="forget_wanted_bases", act=_forget_wanted_bases, seconds=_often),
    Periodic(name="seal_audit_log", act=_seal_audit_log, seconds=_often),
    Periodic(name="notify_missed_deadlines", act=_notify_missed_deadlines, seconds=_often),
    Periodic(name="wake_workers", act=_wake_workers, seconds=_often),
    # Soon after a trial has ended. Workers can't do this: they may not create jobs.
    Periodic(name="advance_sweeps", act=_advance_sweeps, seconds=lambda settings: settings.poll_seconds),
    Periodic(name="anchor", act=_anchor, seconds=lambda _: 3600.0, first_seconds=0.0),
    Periodic(name="collect_garbage", act=_collect_garbage, seconds=lambda _: 24 * 3600.0, first_seconds=600.0),
)


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
