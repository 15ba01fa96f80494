"""A batch that this process works on, and the lease by which it holds the batch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import anyio
import anyio.to_thread

from catalog.batches import execution
from catalog.batches.execution import BatchClaim, Directive
from catalog.clock import boot_seconds
from catalog.db.database import Database
from catalog.errors import LorryError, OutOfSpace, StaleClaim, Unavailable

KEEP_SECONDS = 5.0
"""Interval at which a lease is renewed, and a cancellation is noticed."""
RETRY_SECONDS = 1.0
THREADS = 2
"""Together with the other threads of an API server and the thread that renews leases, fewer than the database's
connections."""
log = logging.getLogger("lorry.api")
T = TypeVar("T")


@dataclass(kw_only=True)
class Threads:
    """Limits of the threads for all batches. Renewals do not wait for the others, which may write large files.

    Create it in the event loop that uses it.
    """

    others: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(THREADS))
    renewals: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(1))

    async def run(self, act: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(act, limiter=self.others)

    async def renew(self, act: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(act, limiter=self.renewals)


@dataclass(kw_only=True)
class LeasedBatch:
    db: Database
    claimed: BatchClaim
    directive: Directive
    threads: Threads
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    """No more lines are answered: the batch is cancelled, has expired, is lost or has crashed."""
    is_lost: bool = False
    """Another process may have taken over. Nothing more is written."""
    has_crashed: bool = False

    async def keep(self) -> None:
        """Renew the lease periodically, and notice a cancellation, an expiry or the loss of the lease."""
        renewed_at = boot_seconds()
        while True:
            await asyncio.sleep(KEEP_SECONDS)
            try:
                began_at, renew = boot_seconds(), partial(execution.renew, self.db, self.claimed)
                self.follow(await self.threads.renew(renew))
                renewed_at = began_at
            except StaleClaim:
                self.is_lost = True
            except LorryError as error:
                log.warning("batch=%s code=%s", self.claimed.batch_id, error.code)
            except Exception:  # the renewals must survive any failure of one of them
                log.exception("crash in the renewal of the batch %s", self.claimed.batch_id)
            self.is_lost = self.is_lost or boot_seconds() - renewed_at > execution.BATCH_LEASE_SECONDS
            if self.is_lost:
                self.stopping.set()
                return

    def follow(self, directive: Directive) -> None:
        self.directive = directive
        if directive.is_expired or directive.status == "cancelling":
            self.stopping.set()

    async def persist(self, act: Callable[[], T]) -> T:
        """Run `act`, again and again while the database or the store is unavailable or full. Raises StaleClaim."""
        while True:
            if self.is_lost:
                raise StaleClaim
            try:
                return await self.threads.run(act)
            except (Unavailable, OutOfSpace) as error:
                log.warning("batch=%s code=%s", self.claimed.batch_id, error.code)
                await asyncio.sleep(RETRY_SECONDS)
