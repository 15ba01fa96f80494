"""Runs the background tasks of a worker: imports of base models, preparations of files and plans, one at a time on a
thread. A second thread makes exports, which may take hours and must not delay jobs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from catalog.disk import full_disk_named
from catalog.error_texts import ErrorText
from catalog.errors import LorryError, OutOfSpace, StaleClaim, Unavailable
from catalog.exports import commands
from catalog.lifecycle import preparation
from catalog.plans import claims
from catalog.registry import base_models
from catalog.storage.manifest import DamagedArtifact
from catalog.tasks import outcomes, task_queue
from catalog.tasks.outcomes import TaskSubject
from catalog.tasks.task_queue import TaskClaim, TaskKind
from worker.background import base_models as bases
from worker.background import exports, tokenization
from worker.background.child_task import Abandoned, AttemptFailed
from worker.context.context import WorkerContext

log = logging.getLogger(__name__)
SUBJECTS: Mapping[TaskKind, TaskSubject[Any]] = {
    TaskKind.IMPORT: base_models.IMPORT,
    TaskKind.PLAN: claims.PLAN,
    TaskKind.PREPARATION: preparation.PREPARATION,
    TaskKind.EXPORT: commands.EXPORT,
}
HANDLERS: Mapping[TaskKind, Callable[[WorkerContext, TaskClaim], bool]] = {
    TaskKind.IMPORT: bases.import_base,
    TaskKind.PLAN: tokenization.compute_plan,
    TaskKind.PREPARATION: tokenization.prepare,
    TaskKind.EXPORT: exports.make_export,
}
"""A handler works on a claimed task and finishes it, or raises an error. It returns False if it leaves the task to
others."""
RETRY_SECONDS = 10.0
"""Wait of a task after a full disk or an unreachable store."""
CLEANING_SECONDS = 3600.0
"""Interval at which files of deleted base models are removed."""
BACK_OFF_SECONDS = 10.0
"""Pause after a task that failed. It doubles if tasks fail repeatedly."""
MAX_DOUBLINGS = 5


class TaskDelayed(Exception):
    """A task failed, and this is recorded. The node may be the cause, so it must wait before the next one. Otherwise it
    would take one task after another away from nodes that can do them."""


def run_next(context: WorkerContext, kinds: Collection[TaskKind]) -> bool:
    """Claim the next task that this worker can do, and work on it. Returns False if there is none.

    Raises StaleClaim, Unavailable, TaskDelayed.
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
        if task is None or _attempt(context, task):
            return task is not None
        left_to_others.append(task.subject)


def _attempt(context: WorkerContext, task: TaskClaim) -> bool:
    """Work on a claimed task, and record how the attempt ends. Returns False if the task is left to other workers."""
    db, subject = context.db, SUBJECTS[task.kind]
    try:
        if task.is_exhausted:
            outcomes.fail_lost(db, task, subject)
            return True
        with full_disk_named():
            return HANDLERS[task.kind](context, task)
    except StaleClaim:
        raise
    except Abandoned:
        outcomes.release(db, task, subject)
    except (OutOfSpace, Unavailable) as error:
        with suppress(Unavailable):
            outcomes.release(db, task, subject, error.text, wait_seconds=RETRY_SECONDS)
        if isinstance(error, OutOfSpace):
            log.warning("%s", error)
            raise TaskDelayed from error
        raise
    except (AttemptFailed, DamagedArtifact) as error:
        log.warning("%s", error)
        outcomes.retry(db, task, subject, error.text)
        raise TaskDelayed from error
    except LorryError as error:
        outcomes.fail(db, task, subject, error.text)
    except OSError as error:
        log.warning("%s", error)
        outcomes.retry(db, task, subject, ErrorText.of("node_failed", reason=error.strerror or str(error)))
        raise TaskDelayed from error
    return True


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
        """Return the pause after a failure. It doubles from the third consecutive failed task on, because the first
        failures may be caused by the files."""
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
        except TaskDelayed:
            self._num_delayed += 1
            self._has_failed = self._num_delayed > 1
            return not self._has_failed
        except StaleClaim:
            log.info("Another worker has taken over the current task, or a user has cancelled it.")
            return True
        except Unavailable as error:
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
            bases.clean(context)


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
