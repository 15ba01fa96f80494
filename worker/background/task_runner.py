"""Runs the background tasks of a worker: imports of base models, preparations of files and plans, one at a time on a
thread. A second thread makes exports, which may take hours and must not delay jobs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self

from catalog.errors import OutOfSpace, StaleClaim, Unavailable
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskClaim, TaskKind
from worker.background import base_models, exports, tokenization
from worker.context.context import WorkerContext

log = logging.getLogger(__name__)
HANDLERS: Mapping[TaskKind, Callable[[WorkerContext, TaskClaim], bool]] = {
    TaskKind.IMPORT: base_models.import_base,
    TaskKind.PLAN: tokenization.compute_plan,
    TaskKind.PREPARATION: tokenization.prepare,
    TaskKind.EXPORT: exports.make_export,
}
"""A handler works on a claimed task, and finishes or releases it. It returns False if it leaves the task to others."""
CLEANING_SECONDS = 3600.0
"""Interval at which files of deleted base models are removed."""
BACK_OFF_SECONDS = 10.0
"""Pause after a task that failed. It doubles if the preparation of files fails repeatedly."""
MAX_DOUBLINGS = 5


def run_next(context: WorkerContext, kinds: Collection[TaskKind]) -> bool:
    """Claim the next task that this worker can do, and work on it. Returns False if there is none.

    Raises StaleClaim, Unavailable, OutOfSpace, PreparationDelayed.
    """
    left_to_others = exports.refused(context)
    while True:
        task = task_queue.claim(
            context.db,
            kinds,
            worker_id=context.worker_id,
            lease_seconds=context.settings.lease_seconds,
            skipping=left_to_others,
            aging_seconds=context.policy.priority_aging_seconds,
        )
        if task is None or HANDLERS[task.kind](context, task):
            return task is not None
        left_to_others.append(task.subject)


class _TaskThread:
    """Runs one task after another. The thread lives as long as the block, because a child dies with the thread that
    started it."""

    def __init__(self, context: WorkerContext, *kinds: TaskKind, name: str) -> None:
        self._context = context
        self._kinds = kinds
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self.current: Future[bool] | None = None
        self._next_poll_at = 0.0
        self._has_failed = False
        self._num_delayed = 0
        """Number of consecutive tasks that failed, perhaps because of this node."""

    def end(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def advance(self, *, was_notified: bool = False) -> bool:
        """Start the next task if none is running. Returns False if a poll has found none, or a task has failed.

        was_notified: there may be new work, so the next poll is due now, unless the last task failed.
        """
        if self.current is None:
            is_early = time.monotonic() < self._next_poll_at
            if is_early and (not was_notified or self._has_failed):
                return False
            self.current = self._pool.submit(self.do_one)
            return True
        if not self.current.done():
            return True
        done, self.current = self.current, None
        found = done.result()
        pause = self.back_off() if self._has_failed else self._context.settings.poll_seconds
        self._next_poll_at = 0.0 if found else time.monotonic() + pause
        return found

    def back_off(self) -> float:
        """Return the pause after a failure. It doubles from the third consecutive failed preparation on, because the
        first failures may be caused by the files."""
        return BACK_OFF_SECONDS * 2 ** min(max(0, self._num_delayed - 2), MAX_DOUBLINGS)

    def do_one(self) -> bool:
        """Run one task. Never raises, so that a failure does not affect training: the lease of the task expires."""
        self._has_failed = False
        if self._context.draining:
            return False
        try:
            found = run_next(self._context, self._kinds)
            if found:
                self._num_delayed = 0
                self._context.notifier.wake_workers()  # a prepared job may train now
            elif TaskKind.IMPORT in self._kinds:
                self._clean_when_due()
            return found
        except tokenization.PreparationDelayed:
            self._num_delayed += 1
            self._has_failed = self._num_delayed > 1
            return not self._has_failed
        except StaleClaim:
            log.info("Another worker has taken over the current task, or a user has cancelled it.")
            return True
        except (Unavailable, OutOfSpace) as error:
            log.warning("%s Background tasks are delayed.", error)
        except Exception:
            log.exception("A background task failed.")
        self._has_failed = True
        return False

    def _clean_when_due(self) -> None:
        """Clean up once an hour, if there is nothing else to do."""
        context = self._context
        if time.monotonic() - context.cleaned_at >= CLEANING_SECONDS:
            context.cleaned_at = time.monotonic()
            base_models.clean(context)


class TaskRunner:
    """Both threads. Leaving the block waits for their tasks. After an error they are stopped, because an export may
    take hours."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        quick = (TaskKind.IMPORT, TaskKind.PLAN, TaskKind.PREPARATION)
        self.threads = (
            _TaskThread(context, *quick, name="tasks"),
            _TaskThread(context, TaskKind.EXPORT, name="exports"),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._context.stopping_tasks.set()
        try:
            for thread in self.threads:
                thread.end()
        finally:
            self._context.stopping_tasks.clear()

    def advance(self, *, was_notified: bool = False) -> bool:
        """Advance both threads. Returns False if neither has anything to do."""
        advanced = [thread.advance(was_notified=was_notified) for thread in self.threads]
        return any(advanced)

    @property
    def is_busy(self) -> bool:
        """Whether a task is running."""
        return not all(task.done() for task in self._current())

    def wait(self, seconds: float) -> bool:
        """Wait until a task is done, or `seconds` have passed. Returns whether `advance` is due."""
        running = self._current()
        return not running or bool(wait(running, timeout=seconds, return_when=FIRST_COMPLETED).done)

    def _current(self) -> list[Future[bool]]:
        return [thread.current for thread in self.threads if thread.current is not None]
