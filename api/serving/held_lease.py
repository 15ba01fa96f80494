"""A lease on an endpoint that a task of its own renews, however long the other tasks wait for the server."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable

from catalog.clock import boot_seconds
from catalog.errors import LorryError
from catalog.serving import keeping

RENEW_SECONDS = keeping.ENDPOINT_LEASE_SECONDS / 3
log = logging.getLogger("lorry.api")


class LeaseLost(Exception):
    """Another process keeps the endpoint, or the endpoint is gone."""


class HeldLease:
    """renew: extends the lease. Returns False if it is lost, and raises LorryError if the database does not answer."""

    def __init__(self, renew: Callable[[], Awaitable[bool]]) -> None:
        self._renew = renew
        self._renewed_at = -math.inf
        self._is_lost = False

    async def keep(self) -> None:
        """Renew the lease until it is lost. Raises LeaseLost."""
        while True:
            try:
                await self._extend()
            except LorryError as error:
                log.warning("serving lease code=%s", error.code)
            if self._is_lost:
                raise LeaseLost
            await asyncio.sleep(RENEW_SECONDS)

    async def check(self) -> None:
        """Make sure that no other process keeps the endpoint, before a change of the server or of its files.

        Renews a lease that may have expired, for example because this process was suspended. Raises LeaseLost and
        LorryError.
        """
        if boot_seconds() - self._renewed_at >= keeping.ENDPOINT_LEASE_SECONDS:
            await self._extend()
        if self._is_lost:
            raise LeaseLost

    def check_now(self) -> None:
        """Make sure that the lease is valid, in a thread that may have waited long. Raises LeaseLost."""
        if self._is_lost or boot_seconds() - self._renewed_at >= keeping.ENDPOINT_LEASE_SECONDS:
            raise LeaseLost

    def end(self) -> None:
        """The lease is released. Threads that still run find it lost."""
        self._is_lost = True

    async def _extend(self) -> None:
        began = boot_seconds()
        if await self._renew():
            self._renewed_at = began
        else:
            self._is_lost = True
