"""Finds trainers that have a base model loaded, and asks workers to load it where there is none."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from functools import partial

from starlette.concurrency import run_in_threadpool

from api.inference.answer import failure
from catalog.db.database import Database
from catalog.errors import LorryError, Unavailable
from catalog.inference import engines
from catalog.inference.engines import TrainerAddress
from catalog.inference.requests import Model, NoWorker

LOOK_SECONDS = 0.25
"""Interval at which the search polls for a trainer."""
ASK_SECONDS = 5.0
"""Interval at which it repeats that the base model is wanted; well below WANTED_SECONDS."""
log = logging.getLogger("lorry.api")


class TrainerSearch:
    """The search for all requests of this process that wait for the same base model, in one event loop."""

    def __init__(self, db: Database, model: Model, *, wake_workers: Callable[[], None]) -> None:
        self._db, self._model, self._wake_workers = db, model, wake_workers
        self._waiting: dict[asyncio.Future[list[TrainerAddress]], bool] = {}
        """With whether the request is of a batch."""
        self._task: asyncio.Task[None] | None = None

    @property
    def is_over(self) -> bool:
        return self._task is not None and self._task.done()

    def join(self, *, is_batch: bool) -> asyncio.Future[list[TrainerAddress]]:
        """Return a future for the trainers. It raises LorryError if none can load the base model. Cancel it to leave
        the search."""
        future = asyncio.get_running_loop().create_future()
        self._waiting[future] = is_batch
        future.add_done_callback(self._waiting.pop)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return future

    async def _run(self) -> None:
        """Search until a trainer is found, the load has failed, or no request waits any more."""
        loop = asyncio.get_running_loop()
        asked_at, was_for_clients, since = -math.inf, False, math.inf
        while self._waiting:
            try:
                found, now = await run_in_threadpool(engines.trainers_of, self._db, self._model.pack_key)
                since = min(since, now)
                is_for_clients = not all(self._waiting.values())
                is_due = loop.time() - asked_at >= ASK_SECONDS or is_for_clients > was_for_clients
                if not found and is_due:
                    asked_at, was_for_clients = loop.time(), is_for_clients
                    found = await self._ask(since, is_batch=not is_for_clients)
            except Unavailable as error:
                log.warning("trainer search code=%s", error.code)
                found = []
            except Exception:
                log.exception("crash in the search for a trainer")
                found = RuntimeError("the search failed")
            if found:
                self._end(found)
                return  # a later request begins another search, which may have the base model loaded again
            await asyncio.sleep(LOOK_SECONDS)

    async def _ask(self, since: float, *, is_batch: bool) -> list[TrainerAddress] | LorryError:
        """Ask workers to load the base model. Returns why none of them could; otherwise no trainers."""
        try:
            error = await run_in_threadpool(
                partial(engines.want, self._db, self._model, since=since, is_batch=is_batch)
            )
        except NoWorker as refusal:
            self._end(refusal, clients_only=True)
            return []
        if error is not None:
            return failure(error, prompt="model")
        self._wake_workers()
        return []

    def _end(self, found: list[TrainerAddress] | Exception, *, clients_only: bool = False) -> None:
        for future, is_batch in list(self._waiting.items()):
            if future.done() or (clients_only and is_batch):
                continue
            if isinstance(found, Exception):
                future.set_exception(found)
            else:
                future.set_result(found)
