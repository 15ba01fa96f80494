"""A Celery worker's turns at the queue: when a message rings, and by itself every now and then, for the broker may be
away. Never two at once: a pool process has one device.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from catalog.errors import OutOfSpace, Unavailable

log = logging.getLogger("worker")


class Turns:
    """Of one pool process, on a thread of its own where nobody rang."""

    def __init__(self, work: Callable[[], None], *, seconds: float) -> None:
        """work: until nothing is left to do. seconds: between two looks of its own."""
        self.seconds = seconds
        self._work = work
        self._taken = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_for_ever, name="own-looks", daemon=True)

    def begin(self) -> None:
        """Once per process, after it was forked."""
        self._thread.start()

    def end(self) -> None:
        """Waits for a turn that is being taken: whoever works has been asked to leave."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def take(self) -> None:
        """One that somebody rang for. It waits for the worker's own to end: so the rings after it go to idle workers,
        as they do while a message is worked on."""
        with self._taken:
            self._work()

    def _look_for_ever(self) -> None:
        """None is taken amid another one: after that nothing was left, and the next look comes in time."""
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
        except Exception:  # whatever it is, Celery too logs it and waits for the next message
            log.exception("A look at the queue went wrong.")
