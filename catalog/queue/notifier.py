"""How a waiting worker learns that there is work, sooner than by its next look. Never a promise.

A message names no job: losing one costs seconds, a duplicate nothing. `ring` neither waits nor fails, whatever
the broker does: a thread of its own sends, and holds at most one ring. The API servers ring again, periodically, for
as long as work waits (api/maintenance_loop.py).
"""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from catalog.settings import Settings

QUEUE = "lorry"
TASK = "lorry.work"
TRANSPORT_OPTIONS: dict[str, Any] = {
    # Redis gives out again what was not acknowledged for so long. Rings are acknowledged on receipt, so only one whose
    # worker died at that moment comes again: it could come sooner, and who needs it has looked by himself by then.
    "visibility_timeout": 3600,
    "health_check_interval": 10,  # notices a peer that vanished without a word
    "socket_timeout": 10,  # a Redis that hangs is one that is away; ten times what a worker waits for a message
    "socket_connect_timeout": 2,  # a host that is off never answers: a signal to leave waits no longer than this
    "socket_keepalive": True,  # a firewall forgets a connection on which nothing comes
    "global_keyprefix": "lorry:",  # others may use the same Redis
}
"""Of sender and receiver: they must agree on the prefix."""
MAX_QUEUED = 64
"""Messages that may wait in Redis; no sender adds one to so many. While every worker trains, none reads them, and each
API server goes on ringing. Workers beyond this number find work by polling."""
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
CLOSE_SECONDS = 3.0
"""How long a process that ends waits for its last ring."""

log = logging.getLogger("lorry.doorbell")


class Doorbell(Protocol):
    """Rung after a commit that makes work."""

    def ring(self) -> None:
        """Say that there may be work. Returns at once; never raises."""
        ...

    def close(self) -> None:
        """Send a ring that still waits, if that can be done soon."""
        ...


def open_doorbell(settings: Settings) -> Doorbell:
    """Redis where the settings name one; else the file that workers on this data folder look at."""
    redis_url = settings.resolved_redis_url()
    return RedisDoorbell(redis_url) if redis_url else FileDoorbell(settings.bell_path())


class FileDoorbell:
    """For one machine: a file whose time of change says when it was last rung. Who waits looks at it often, for a
    look costs microseconds, and at the database seldom."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._heard = self._rung_at()

    def ring(self) -> None:
        with suppress(OSError):  # a full disk, say: work is found by the next look at the database
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch()

    def has_rung(self) -> bool:
        """Since the last call of this, or since this object was made."""
        before, self._heard = self._heard, self._rung_at()
        return self._heard != before

    def close(self) -> None:
        return

    def _rung_at(self) -> int:
        """Nanoseconds; 0 before the first ring."""
        try:
            return self._path.stat().st_mtime_ns
        except OSError:
            return 0


class RedisDoorbell:
    """Sends `lorry.work` through Celery. Rings that come while one is being sent become one; none is sent while
    MAX_QUEUED messages wait."""

    def __init__(self, redis_url: str, *, first_wait_seconds: float = FIRST_WAIT_SECONDS) -> None:
        self._redis_url = redis_url
        self._first_wait_seconds = first_wait_seconds
        self._changed = threading.Condition()
        self._rung = False
        self._closing = False
        self._thread: threading.Thread | None = None

    def ring(self) -> None:
        with self._changed:
            if self._closing:
                return
            self._rung = True
            self._changed.notify()
            if self._thread is None:  # at the first ring: a process that forks after opening keeps its own
                self._thread = threading.Thread(target=self._relay, name="lorry-doorbell", daemon=True)
                self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)

    def _relay(self) -> None:
        app = _sender(self._redis_url)
        wait_seconds = self._first_wait_seconds
        while self._take():
            try:
                with app.producer_or_acquire() as producer:
                    # kombu prefixes the key as it does when it sends
                    if producer.channel.client.llen(QUEUE) < MAX_QUEUED:
                        app.send_task(TASK, producer=producer, queue=QUEUE, retry=False, ignore_result=True)
                wait_seconds = self._first_wait_seconds
            except Exception as error:  # noqa: BLE001  (whatever it is, a later look finds the work)
                log.warning("The broker took no ring (%s). They find work by looking.", type(error).__name__)
                self._put_back(wait_seconds)
                wait_seconds = min(2 * wait_seconds, LONGEST_WAIT_SECONDS)
        app.close()

    def _take(self) -> bool:
        """Wait for a ring and take it; False when it is time to end and none is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._rung or self._closing)
            taken, self._rung = self._rung, False
            return taken

    def _put_back(self, wait_seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing, timeout=wait_seconds)
            self._rung = not self._closing


def _sender(redis_url: str) -> Any:
    # late: a process that never rings never loads it
    from celery import Celery  # pyright: ignore[reportMissingTypeStubs]

    app: Any = Celery("lorry-doorbell", broker=redis_url, set_as_current=False)
    app.conf.update(
        task_ignore_result=True,
        result_backend=None,
        task_serializer="json",
        broker_transport_options={**TRANSPORT_OPTIONS, "max_retries": 1},
    )
    return app
