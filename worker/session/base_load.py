"""The task to load a base model that inference requests wait for, from its claim until a trainer has loaded it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

from catalog.errors import LorryError, StaleClaim
from catalog.inference import engines
from catalog.tables.table import Json
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskClaim
from worker.context.context import WorkerContext

log = logging.getLogger(__name__)


class BaseLoad:
    """A claimed task. It ends once, by one of the methods; the others then do nothing."""

    def __init__(self, context: WorkerContext, claimed: TaskClaim) -> None:
        self._context, self._claimed = context, claimed
        self._is_over = False
        context.heartbeat.renewals.append(self._renew)

    def succeed(self) -> None:
        self._end(lambda: engines.note_loaded(self._context.db, self._claimed))

    def fail(self, error: Json) -> None:
        """Fail the requests that wait."""
        self._end(lambda: engines.fail(self._context.db, self._claimed, error))

    def retry(self) -> None:
        """Let a worker try again: the load has failed, and the base model may be the cause."""
        self._end(lambda: engines.retry(self._context.db, self._claimed))

    def give_back(self) -> None:
        """Let another worker load it. The attempt does not count."""
        self._end(lambda: task_queue.release(self._context.db, self._claimed))

    def _renew(self) -> None:
        """The heartbeat's thread calls it. A load whose task was lost continues, because its trainer can
        answer requests."""
        task_queue.renew(self._context.db, self._claimed, lease_seconds=self._context.settings.lease_seconds)

    def _end(self, act: Callable[[], None]) -> None:
        if self._is_over:
            return
        self._is_over = True
        with suppress(ValueError):  # the heartbeat has ended
            self._context.heartbeat.renewals.remove(self._renew)
        try:
            act()
        except (LorryError, StaleClaim) as error:  # its lease expires
            log.warning("Not recorded: %s", error)
