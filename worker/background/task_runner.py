"""The background tasks of a worker: it imports base models, prepares files and cleans up, one task at a time on a
thread. A second thread makes exports, which may take hours and must not delay jobs."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self

from catalog.errors import OutOfSpace, StaleClaim, Unavailable
from worker.background import base_models, exports, plan_inputs, tokenization
from worker.context.context import WorkerContext

log = logging.getLogger(__name__)
CLEANING_SECONDS = 3600.0
"""Interval at which files of deleted base models are removed."""
BACK_OFF_SECONDS = 10.0
"""Pause after a task that failed. It doubles if the preparation of files fails repeatedly."""
MAX_DOUBLINGS = 5


class _TaskThread(ABC):
    """Runs one task after another. The thread lives as long as the block, because a child dies with the thread that
    started it."""

    def __init__(self, context: WorkerContext, *, name: str) -> None:
        self._context = context
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._current: Future[bool] | None = None
        self._next_poll_at = 0.0
        self._has_failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def advance(self, *, was_notified: bool = False) -> bool:
        """Start the next task if none is running. Returns False if a poll has found none, or a task has failed.

        was_notified: there may be new work, so the next poll is due now, unless the last task failed.
        """
        if self._current is None:
            is_early = time.monotonic() < self._next_poll_at
            if is_early and (not was_notified or self._has_failed):
                return False
            self._current = self._pool.submit(self._do_one)
            return True
        if not self._current.done():
            return True
        done, self._current = self._current, None
        found = done.result()
        pause = self._back_off() if self._has_failed else self._context.settings.poll_seconds
        self._next_poll_at = 0.0 if found else time.monotonic() + pause
        return found

    def _back_off(self) -> float:
        """Return the pause after a failure."""
        return BACK_OFF_SECONDS

    def current(self) -> list[Future[bool]]:
        """Return the current task, if there is one."""
        return [] if self._current is None else [self._current]

    def _do_one(self) -> bool:
        """Run one task. Never raises, so that a failure does not affect training: the lease of the task expires."""
        self._has_failed = False
        if self._context.draining:
            return False
        try:
            return self._run_next()
        except StaleClaim:
            log.info("Another worker has taken over the current task, or a user has cancelled it.")
            return True
        except (Unavailable, OutOfSpace) as error:
            log.warning("%s Background tasks are delayed.", error)
        except Exception:
            log.exception("A background task failed.")
        self._has_failed = True
        return False

    @abstractmethod
    def _run_next(self) -> bool:
        """Run the next task. Returns False if there is none."""


class _ExportThread(_TaskThread):
    """Makes exports."""

    def _run_next(self) -> bool:
        return exports.export_next(self._context)


class TaskRunner(_TaskThread):
    """Runs the background tasks."""

    def __init__(self, context: WorkerContext) -> None:
        super().__init__(context, name="tasks")
        self._exports = _ExportThread(context, name="exports")
        self._num_delayed = 0
        """Number of consecutive preparations that failed, perhaps because of this node."""
        self._last_was_job = False
        """The last preparation was for a job and not for a plan."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the tasks. After an error they are stopped, because an export may take hours."""
        if error is not None:
            self._context.stopping_tasks.set()
        try:
            with self._exports:
                super().__exit__(kind, error, trace)
        finally:
            self._context.stopping_tasks.clear()

    def advance(self, *, was_notified: bool = False) -> bool:
        is_exporting = self._exports.advance(was_notified=was_notified)
        return super().advance(was_notified=was_notified) or is_exporting

    def _back_off(self) -> float:
        """Return the pause after a failure. It doubles from the third consecutive failed preparation on, because the
        first failures may be caused by the files."""
        return BACK_OFF_SECONDS * 2 ** min(max(0, self._num_delayed - 2), MAX_DOUBLINGS)

    @property
    def is_busy(self) -> bool:
        """Whether a task or an export is running."""
        return not all(task.done() for task in self._all_current())

    def wait(self, seconds: float) -> bool:
        """Wait until a task or an export is done, or `seconds` have passed. Returns whether `advance` is due."""
        running = self._all_current()
        return not running or bool(wait(running, timeout=seconds, return_when=FIRST_COMPLETED).done)

    def _all_current(self) -> list[Future[bool]]:
        return [*self.current(), *self._exports.current()]

    def _run_next(self) -> bool:
        try:
            found = self._next_task()
        except tokenization.PreparationDelayed:
            self._num_delayed += 1
            self._has_failed = self._num_delayed > 1
            return not self._has_failed
        if found:
            self._context.notifier.wake_workers()  # a prepared job may train now
        else:
            self._clean_when_due()
        return found

    def _next_task(self) -> bool:
        return base_models.import_next(self._context) or self._prepare_one()

    def _prepare_one(self) -> bool:
        """Prepare the files of a job, or compute a plan. They alternate if both wait, because a user waits for a
        plan."""
        preparers = [tokenization.prepare_next, plan_inputs.compute_next]
        for prepare in reversed(preparers) if self._last_was_job else preparers:
            self._last_was_job = prepare is tokenization.prepare_next
            if prepare(self._context):
                self._num_delayed = 0
                return True
        return False

    def _clean_when_due(self) -> None:
        """Clean up once an hour, if there is nothing else to do."""
        context = self._context
        if time.monotonic() - context.cleaned_at >= CLEANING_SECONDS:
            context.cleaned_at = time.monotonic()
            base_models.clean(context)
