"""The turns in which a Celery worker works: for each message, and at intervals, because the broker may be unavailable.

Two turns never run at once, because a pool process has one device.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from catalog.errors import OutOfSpace, Unavailable

log = logging.getLogger("worker")


class Turns:
    """The turns of one pool process. Those without a message run on a separate thread."""

    def __init__(self, work: Callable[[], None], *, seconds: float) -> None:
        """work: works until nothing is left to do. seconds: the interval between two polls."""
        self.seconds = seconds
        self._work = work
        self._taken = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_for_ever, name="own-looks", daemon=True)

    def begin(self) -> None:
        """Start polling. Call it once per process, after the fork."""
        self._thread.start()

    def end(self) -> None:
        """Stop polling. Waits for the current turn, whose worker has been asked to leave."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def take(self) -> None:
        """Take a turn for a message. It waits for a turn of the polling thread to end. Meanwhile, further messages go
        to idle workers, as during any turn for a message."""
        with self._taken:
            self._work()

    def _look_for_ever(self) -> None:
        """Poll at intervals. Skips a poll during another turn, because that turn leaves nothing to do."""
        while not self._ended.wait(self.seconds):
            if self._taken.acquire(blocking=False):
                try:
                    self._take_own()
                finally:
                    self._taken.release()

    def _take_own(self) -> None:
        try:
            self._work()
        except (Unavailable, OutOfSpace) as error:
            log.warning("%s", error)
        except Exception:  # Celery also logs any error and waits for the next message
            log.exception("A poll of the queue failed.")
