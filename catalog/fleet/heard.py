"""Which workers were heard from lately by whoever looks again and again: by his own clock, which nobody turns back."""

from __future__ import annotations

import time
from collections.abc import Callable


class Heard:
    """By one worker, of others. A heartbeat that is another one than before has just come, whatever time it bears."""

    def __init__(self, *, silent_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._silent_seconds = silent_seconds
        self._clock = clock
        self._latest: dict[str, float] = {}
        self._moved_at: dict[str, float] = {}

    def is_live(self, worker_id: str, heartbeat_at: float, *, now: float) -> bool:
        """now: by the clock that the heartbeat bears. Where that was set, what was seen to beat still counts; of one
        that was not seen to beat yet, the time of its heartbeat."""
        before = self._latest.get(worker_id)
        self._latest[worker_id] = heartbeat_at
        if before is not None and before != heartbeat_at:
            self._moved_at[worker_id] = self._clock()
        moved_at = self._moved_at.get(worker_id)
        if moved_at is not None and self._clock() - moved_at < self._silent_seconds:
            return True
        return abs(now - heartbeat_at) < self._silent_seconds
