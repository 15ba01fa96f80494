"""Exports the curves of jobs from the database to their trackers.

The exports run on their own thread, with a child process for each open run. A tracker that is slow or unavailable
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
from catalog.history import tracker_exports
from catalog.history.tracker_exports import Export, Follows
from catalog.settings import Settings
from worker.trackers.session import ExportFailed, ExportSession, available, places

log = logging.getLogger(__name__)
TICK_SECONDS = 0.25
POLL_SECONDS = 2.0
"""Interval between two polls for due exports, and between two writes of one export."""
MAX_OPEN = 8
LAST_SECONDS = 10.0
"""Time limit for open runs to write their remaining points when the worker exits."""


@contextmanager
def exporting(db: Database, settings: Settings) -> Generator[None]:
    """Export during the block. Does nothing if no tracker is available."""
    types = available(settings)
    if not types:
        yield
        return
    writer = Exports(db, settings, types)
    writer.start()
    try:
        yield
    finally:
        writer.close()


@dataclass(kw_only=True, slots=True, eq=False)
class _Open:
    """A claimed export, with its run once that is open."""

    export: Export
    session: ExportSession | None = None
    due_at: float = 0.0
    round: Future[Follows] | None = None


class Exports:
    def __init__(self, db: Database, settings: Settings, types: tuple[str, ...]) -> None:
        self._db, self._settings, self._types = db, settings, types
        self._open: list[_Open] = []
        self._polled_at = 0.0
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=MAX_OPEN, thread_name_prefix="exports")
        self._thread = threading.Thread(target=self._run, name="exports", daemon=True)

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
                log.warning("exports code=%s", error.code)
                self._stopping.wait(POLL_SECONDS)
            except Exception:
                log.exception("crash in the exports")
                self._stopping.wait(POLL_SECONDS)
        self._end()

    def _tick(self) -> None:
        now = time.monotonic()
        for one in list(self._open):
            if one.round is not None and one.round.done():
                self._finish_round(one)
        if now - self._polled_at >= POLL_SECONDS:
            self._polled_at = now
            found = tracker_exports.claim(self._db, types=self._types, limit=MAX_OPEN - len(self._open))
            self._open += [_Open(export=export) for export in found]
        for one in self._open:
            if one.round is None and one.due_at <= now:
                one.round = self._pool.submit(self._round, one)

    def _finish_round(self, one: _Open) -> None:
        assert one.round is not None
        finished, one.round = one.round, None
        error = finished.exception()
        if error is None and finished.result() is Follows.GO_ON:
            return
        self._open.remove(one)
        if isinstance(error, LorryError):
            log.warning("exports code=%s", error.code)  # the claim expires, and the export starts again
        elif error is not None:
            log.error("crash in an export", exc_info=error)

    def _round(self, one: _Open) -> Follows:
        """Write the new points of one job. Closes its run unless the export continues."""
        follows = Follows.DONE
        try:
            news = tracker_exports.poll(self._db, one.export)
            if one.session is None:
                one.session = self._begin(one.export, news.run)
            one.session.write(news.points, news.end)
            one.export, follows = tracker_exports.record(self._db, one.export, news, run_id=one.session.run_id)
            one.due_at = 0.0 if news.has_more else time.monotonic() + POLL_SECONDS
        except ExportFailed as failure:
            tracker_exports.fail(self._db, one.export, str(failure))
        finally:
            if follows is not Follows.GO_ON and one.session is not None:
                one.session.close()
        return follows

    def _begin(self, export: Export, run: dict[str, object]) -> ExportSession:
        opening = {
            "type": export.type,
            "run": run,
            "run_id": export.run_id,
            "next_step": max(export.train_step, export.valid_step) + 1,
            "places": {export.type: places(self._settings)[export.type]},
        }
        return ExportSession(opening)

    def _end(self) -> None:
        """Write the remaining points, within the time limit. The next worker writes the rest."""
        wait([one.round for one in self._open if one.round is not None], timeout=LAST_SECONDS)
        for one in self._open:
            if one.round is None:
                one.round = self._pool.submit(self._round, one)
        wait([one.round for one in self._open if one.round is not None], timeout=LAST_SECONDS)
        for one in self._open:
            is_over = one.round is not None and one.round.done()
            if one.session is not None:
                one.session.close() if is_over else one.session.kill()
            with suppress(LorryError):
                tracker_exports.release(self._db, one.export)
        self._pool.shutdown(wait=True, cancel_futures=True)
