"""Writes the curves of jobs from the database to the runs in their trackers.

This happens on a thread of its own, with a child process for each open run. A tracker that is slow or unavailable
delays nothing else: its job only gets a line in its events.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from catalog.db.database import Database
from catalog.errors import LorryError
from catalog.history import tracker_runs
from catalog.history.tracker_runs import Follows, TrackerRunClaim
from catalog.settings import Settings
from worker.trackers.session import TrackerRunFailed, TrackerRunSession, available, places

log = logging.getLogger(__name__)
TICK_SECONDS = 0.25
POLL_SECONDS = 2.0
"""Interval between two polls for due runs, and between two writes to one run."""
MAX_OPEN = 8
LAST_SECONDS = 10.0
"""Time limit for open runs to write their remaining points when the worker exits."""


@contextmanager
def writing_runs(db: Database, settings: Settings) -> Generator[None]:
    """Write to the trackers during the block. Does nothing if no tracker is available."""
    types = available(settings)
    if not types:
        yield
        return
    writer = TrackerRuns(db, settings, types)
    writer.start()
    try:
        yield
    finally:
        writer.close()


@dataclass(kw_only=True, slots=True, eq=False)
class _Claimed:
    """A claimed run, with its session once it is open."""

    claim: TrackerRunClaim
    session: TrackerRunSession | None = None
    due_at: float = 0.0
    round: Future[Follows] | None = None


class TrackerRuns:
    """The claimed runs, and the thread that writes to them."""

    def __init__(self, db: Database, settings: Settings, types: tuple[str, ...]) -> None:
        self._db, self._settings, self._types = db, settings, types
        self._claimed: list[_Claimed] = []
        self._polled_at = 0.0
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=MAX_OPEN, thread_name_prefix="trackers")
        self._thread = threading.Thread(target=self._run, name="trackers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(TICK_SECONDS):
            try:
                self._tick()
            except LorryError as error:
                log.warning("%s Writing to trackers is delayed.", error)
                self._stopping.wait(POLL_SECONDS)
            except Exception:
                log.exception("Writing to trackers failed, and is retried.")
                self._stopping.wait(POLL_SECONDS)
        self._end()

    def _tick(self) -> None:
        now = time.monotonic()
        for one in list(self._claimed):
            if one.round is not None and one.round.done():
                self._finish_round(one)
        if now - self._polled_at >= POLL_SECONDS:
            self._polled_at = now
            found = tracker_runs.claim(self._db, types=self._types, limit=MAX_OPEN - len(self._claimed))
            self._claimed += [_Claimed(claim=claim) for claim in found]
        for one in self._claimed:
            if one.round is None and one.due_at <= now:
                one.round = self._pool.submit(self._round, one)

    def _finish_round(self, one: _Claimed) -> None:
        assert one.round is not None
        finished, one.round = one.round, None
        error = finished.exception()
        if error is None and finished.result() is Follows.GO_ON:
            return
        self._claimed.remove(one)
        if isinstance(error, LorryError):  # the claim expires, and then a worker opens the run again
            log.warning("%s Writing the curves of job %s to %s is retried.", error, one.claim.job_id, one.claim.type)
        elif error is not None:
            log.error("Writing the curves of job %s to %s failed.", one.claim.job_id, one.claim.type, exc_info=error)

    def _round(self, one: _Claimed) -> Follows:
        """Write the new points of one job. Closes its run unless it is to stay open."""
        follows = Follows.DONE
        try:
            news = tracker_runs.poll(self._db, one.claim)
            if one.session is None:
                one.session = self._begin(one.claim, news.run)
            one.session.write(news.points, news.end)
            one.claim, follows = tracker_runs.record(self._db, one.claim, news, run_id=one.session.run_id)
            one.due_at = 0.0 if news.has_more else time.monotonic() + POLL_SECONDS
        except TrackerRunFailed as failure:
            tracker_runs.fail(self._db, one.claim, str(failure))
        finally:
            if follows is not Follows.GO_ON and one.session is not None:
                one.session.close()
        return follows

    def _begin(self, claim: TrackerRunClaim, run: dict[str, object]) -> TrackerRunSession:
        opening = {
            "type": claim.type,
            "run": run,
            "run_id": claim.run_id,
            "next_step": max(claim.train_step, claim.valid_step) + 1,
            "places": {claim.type: places(self._settings)[claim.type]},
        }
        return TrackerRunSession(opening)

    def _end(self) -> None:
        """Write the remaining points, within the time limit. The next worker writes the rest."""
        wait([one.round for one in self._claimed if one.round is not None], timeout=LAST_SECONDS)
        for one in self._claimed:
            if one.round is None:
                one.round = self._pool.submit(self._round, one)
        wait([one.round for one in self._claimed if one.round is not None], timeout=LAST_SECONDS)
        for one in self._claimed:
            is_over = one.round is not None and one.round.done()
            if one.session is not None:
                one.session.close() if is_over else one.session.kill()
            with suppress(LorryError):
                tracker_runs.release(self._db, one.claim)
        self._pool.shutdown(wait=True, cancel_futures=True)
