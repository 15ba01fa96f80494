"""A loop that claims tasks of one kind, and works on several at the same time, each in an asyncio task of its own.

Every API server runs these loops; they share the work by the leases of catalog/tasks. A poll that fails is logged, and
so is work that fails: its lease expires, and then it is claimed again.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Generic, TypeVar

from catalog.errors import LorryError, StaleClaim

ClaimT = TypeVar("ClaimT")
CLOSE_SECONDS = 5.0
"""Maximum time that cancelled work has to release its leases at shutdown."""
log = logging.getLogger("lorry.api")


class TaskLoop(ABC, Generic[ClaimT]):
    def __init__(self, name: str, *, finish_seconds: float = 0.0) -> None:
        """finish_seconds: how long work may continue at shutdown before it is cancelled."""
        self._name, self._finish_seconds = name, finish_seconds
        self._claims: dict[asyncio.Task[None], ClaimT] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake_up = asyncio.Event()

    @property
    @abstractmethod
    def most(self) -> int:
        """On how many claims the process works at a time."""

    @property
    @abstractmethod
    def look_seconds(self) -> float:
        """Interval of the polls."""

    @abstractmethod
    async def claim(self) -> ClaimT | None:
        """Claim the next task; None if there is none."""

    @abstractmethod
    async def work(self, claimed: ClaimT) -> None:
        """Do the work, and finish or release the task."""

    def wake(self) -> None:
        """Signal that there may be a task. May be called from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.on_wake)

    def on_wake(self) -> None:
        self._wake_up.set()

    @property
    def claims(self) -> list[ClaimT]:
        """The claims that the process works on."""
        return list(self._claims.values())

    async def run(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            while True:
                await self._poll()
                with suppress(TimeoutError):
                    async with asyncio.timeout(self.look_seconds):
                        await self._wake_up.wait()
                self._wake_up.clear()
        finally:
            await self._stop()

    async def _poll(self) -> None:
        try:
            while len(self._claims) < self.most and (claimed := await self.claim()) is not None:
                task = asyncio.create_task(self._guarded(claimed))
                self._claims[task] = claimed
                task.add_done_callback(self._forget)
        except LorryError as error:
            log.warning("%s code=%s", self._name, error.code)
        except StaleClaim:  # the process was stopped for longer than a lease
            log.warning("%s: a claim was lost", self._name)
        except Exception:  # the loop must survive any failure of one poll
            log.exception("crash in %s", self._name)

    def _forget(self, task: asyncio.Task[None]) -> None:
        del self._claims[task]
        self._wake_up.set()

    async def _guarded(self, claimed: ClaimT) -> None:
        try:
            await self.work(claimed)
        except LorryError as error:
            log.warning("%s code=%s", self._name, error.code)
        except StaleClaim:
            log.warning("%s: a claim was lost", self._name)
        except Exception:
            log.exception("crash in %s", self._name)

    async def _stop(self) -> None:
        if self._claims and self._finish_seconds:
            await asyncio.wait(self._claims, timeout=self._finish_seconds)
        for task in self._claims:
            task.cancel()
        if self._claims:
            await asyncio.wait(self._claims, timeout=CLOSE_SECONDS)
