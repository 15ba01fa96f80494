"""What a worker does besides training, one thing at a time on a thread: import bases, prepare files, clean."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType

from catalog.errors import OutOfSpace, StaleClaim, Unavailable
from worker.background import base_models, plan_inputs, tokenization
from worker.context.context import WorkerContext

log = logging.getLogger(__name__)
CLEANING_SECONDS = 3600.0
"""Between two looks for files of deleted bases."""
BACK_OFF_SECONDS = 10.0
"""After a chore that went wrong; where files could not be prepared time and again, twice as long each time."""
MAX_DOUBLINGS = 5


class Chores:
    """The thread lives as long as the block: a child dies with the thread that started it."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="chores")
        self._current: Future[bool] | None = None
        self._looks_again_at = 0.0
        self._went_wrong = False
        self._num_hindered = 0
        """Preparations in a row that came to nothing, perhaps by this node's doing."""
        self._was_job = False
        """What was prepared last was of a job."""

    def __enter__(self) -> Chores:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def go_on(self, *, has_rung: bool = False) -> bool:
        """Begin the next chore if none is being done. False once a look has found none, or went wrong.

        has_rung: there may be something new, so the next look is due, unless the last one went wrong.
        """
        if self._current is None:
            is_early = time.monotonic() < self._looks_again_at
            if is_early and (not has_rung or self._went_wrong):
                return False
            self._current = self._pool.submit(self._do_one)
            return True
        if not self._current.done():
            return True
        done, self._current = self._current, None
        found = done.result()
        pause = self._back_off() if self._went_wrong else self._context.settings.poll_seconds
        self._looks_again_at = 0.0 if found else time.monotonic() + pause
        return found

    def _back_off(self) -> float:
        """The first time that files can't be prepared may be theirs, and costs others no wait."""
        return BACK_OFF_SECONDS * 2 ** min(max(0, self._num_hindered - 2), MAX_DOUBLINGS)

    def wait(self, seconds: float) -> None:
        """Until the current chore is done, or `seconds` have passed."""
        if self._current is not None:
            wait([self._current], timeout=seconds)

    def _do_one(self) -> bool:
        """Whatever goes wrong here ends nobody's training: the lease on what was done runs out."""
        self._went_wrong = False
        if self._context.draining:
            return False
        try:
            found = self._next_chore()
            if found:
                self._context.bell.ring()  # what was prepared may be trained now
            else:
                self._clean_when_due()
            return found
        except StaleClaim:
            log.info("Another worker has taken over what was being prepared here.")
            return True
        except tokenization.Hindered:
            self._num_hindered += 1
            if self._num_hindered == 1:
                return True
        except (Unavailable, OutOfSpace) as error:
            log.warning("%s Imports and preparations wait.", error)
        except Exception:
            log.exception("An import or a preparation went wrong.")
        self._went_wrong = True
        return False

    def _next_chore(self) -> bool:
        return base_models.import_next(self._context) or self._prepare_one()

    def _prepare_one(self) -> bool:
        """Files of a job, or a plan. Where both wait they take turns: before a plan sits a person."""
        acts = [tokenization.prepare_next, plan_inputs.compute_next]
        for act in reversed(acts) if self._was_job else acts:
            self._was_job = act is tokenization.prepare_next
            if act(self._context):
                self._num_hindered = 0
                return True
        return False

    def _clean_when_due(self) -> None:
        """Once an hour, where nothing else is to be done."""
        context = self._context
        if time.monotonic() - context.cleaned_at >= CLEANING_SECONDS:
            context.cleaned_at = time.monotonic()
            base_models.clean(context)
            if base_models.count_blocks(context):
                context.bell.ring()  # what waits may be trained on a divided base now
