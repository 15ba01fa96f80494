"""The turns in which a Celery worker works: for each message, and at intervals, because the broker may be unavailable.

Two turns never run at once, because a pool process has one device.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from catalog.errors import OutOfSpace, Unavailable

log = logging.getLogger("worker")


class QueuePoller:
    """Runs the turns of one pool process. Those without a message run on a separate thread."""

    def __init__(self, work: Callable[[], None], *, seconds: float) -> None:
        """work: works until nothing is left to do. seconds: the interval between two polls."""
        self.seconds = seconds
        self._work = work
        self._busy = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll_loop, name="queue-poller", daemon=True)

    def begin(self) -> None:
        """Start polling. Call it once per process, after the fork."""
        self._thread.start()

    def end(self) -> None:
        """Stop polling. Waits for the current turn, whose worker has been asked to shut down."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def work(self) -> None:
        """Take a turn for a message. It waits for a turn of the polling thread to end. Meanwhile, further messages go
        to idle workers, as during any turn for a message."""
        with self._busy:
            self._work()

    def _poll_loop(self) -> None:
        """Poll at intervals. Skips a poll during another turn, because that turn leaves nothing to do."""
        while not self._ended.wait(self.seconds):
            if self._busy.acquire(blocking=False):
                try:
                    self._poll()
                finally:
                    self._busy.release()

    def _poll(self) -> None:
        try:
            self._work()
        except (Unavailable, OutOfSpace) as error:
            log.warning("%s", error)
        except Exception:  # Celery also logs any error and waits for the next message
            log.exception("A poll of the queue failed.")
