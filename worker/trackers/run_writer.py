"""Writes the curves of jobs from the database to the runs in their trackers.

One thread claims runs, and one thread for each claimed run writes to it by a child process. A tracker that is slow or
unavailable delays nothing else: its job only gets a line in its events.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress

from catalog.db.database import Database
from catalog.errors import LorryError
from catalog.history import tracker_runs
from catalog.history.tracker_runs import TrackerRunClaim
from catalog.settings import Settings
from catalog.tables.history import TrackerRunRow
from catalog.tables.table import Json
from worker.trackers.session import TrackerRunFailed, TrackerRunSession, available, places

log = logging.getLogger(__name__)
POLL_SECONDS = 2.0
"""Interval between two polls for due runs, and between two writes to one run."""
MAX_OPEN = 8
LAST_SECONDS = 20.0
"""Time limit for open runs to write their remaining points when the worker exits."""


@contextmanager
def writing_runs(db: Database, settings: Settings) -> Generator[None]:
    """Write to the trackers during the block. Does nothing if no tracker is available."""
    types = available(settings)
    if not types:
        yield
        return
    writer = _RunWriter(db, settings, types)
    thread = threading.Thread(target=writer.run, name="trackers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        writer.stopping.set()
        thread.join()


class _RunWriter:
    def __init__(self, db: Database, settings: Settings, types: tuple[str, ...]) -> None:
        self._db, self._settings, self._types = db, settings, types
        self.stopping = threading.Event()
        self._sessions: set[TrackerRunSession] = set()

    def run(self) -> None:
        """Claim runs until the worker exits. Then give the threads time to write the remaining points."""
        written: set[Future[None]] = set()
        with ThreadPoolExecutor(max_workers=MAX_OPEN, thread_name_prefix="trackers") as pool:
            while not self.stopping.wait(POLL_SECONDS):
                written = {each for each in written if not each.done()}
                try:
                    claimed = tracker_runs.claim(self._db, types=self._types, limit=MAX_OPEN - len(written))
                    written |= {pool.submit(self._write_run, each) for each in claimed}
                except LorryError as error:
                    log.warning("%s Writing to trackers is delayed.", error)
                except Exception:
                    log.exception("Writing to trackers failed, and is retried.")
            wait(written, timeout=LAST_SECONDS)
            for session in list(self._sessions):
                session.kill()

    def _write_run(self, claim: TrackerRunClaim) -> None:
        """Write the points of one job, until it is no longer training or the worker exits."""
        session: TrackerRunSession | None = None
        current: TrackerRunClaim | None = claim
        try:
            while current is not None:
                is_last = self.stopping.is_set()
                news = tracker_runs.poll(self._db, current)
                if session is None:
                    session = self._begin(current.row, news.run)
                session.write(news.points, news.end)
                current = tracker_runs.record(self._db, current, news, run_id=session.run_id)
                if is_last:
                    break
                if current is not None and not news.has_more:
                    self.stopping.wait(POLL_SECONDS)
        except TrackerRunFailed as failure:
            if not self.stopping.is_set():  # otherwise its process may have been killed, and the next worker tries
                tracker_runs.fail(self._db, claim, str(failure))
        except LorryError as error:  # the claim expires, and then a worker opens the run again
            log.warning("%s Writing the curves of job %s to %s is retried.", error, claim.row.job_id, claim.row.type)
        except Exception:
            log.exception("Writing the curves of job %s to %s failed.", claim.row.job_id, claim.row.type)
        finally:
            if session is not None:
                session.close()
                self._sessions.discard(session)
            if self.stopping.is_set():
                with suppress(LorryError):
                    tracker_runs.release(self._db, claim)

    def _begin(self, row: TrackerRunRow, run: Json) -> TrackerRunSession:
        opening = {
            "type": row.type,
            "run": run,
            "run_id": row.run_id,
            "next_step": max(row.train_step, row.valid_step) + 1,
            "places": {row.type: places(self._settings)[row.type]},
        }
        session = TrackerRunSession(opening)
        self._sessions.add(session)
        return session
