"""Finds waiting work, and notifies idle workers of it, so that they need not wait for their next poll.

A notification names no job: a lost one costs seconds, and a duplicate costs nothing. Sending never blocks or fails,
whatever the broker does: a background thread sends, and merges pending notifications into one. While work waits, the
API servers repeat the notification periodically (api/background/periodic.py).
"""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import or_, select

from catalog.db.database import Database, read_clock
from catalog.settings import Settings
from catalog.states import JobState
from catalog.tables.jobs import Job
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskKind

QUEUE = "lorry"
TASK = "lorry.work"
TRANSPORT_OPTIONS: dict[str, Any] = {
    # After this time (seconds) a message that was not acknowledged is redelivered. Workers acknowledge on receipt, so
    # only a message whose worker died at that moment is affected. A shorter time has no benefit: workers poll anyway.
    "visibility_timeout": 3600,
    "health_check_interval": 10,  # detects a peer that vanished without closing the connection
    "socket_timeout": 10,  # a Redis that hangs counts as unavailable; ten times as long as a worker waits for a message
    "socket_connect_timeout": 2,  # a host that is down never answers, and a stop signal must not wait longer than this
    "socket_keepalive": True,  # a firewall drops idle connections
    "global_keyprefix": "lorry:",  # other applications may use the same Redis
}
"""Celery options of sender and receiver, which must agree on the prefix."""
MAX_QUEUED = 64
"""Maximum number of messages in Redis. While all workers train, no worker reads messages, but the API servers keep
sending. If more workers than this are idle, the others find work by polling."""
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
CLOSE_SECONDS = 3.0
"""How long a process that exits waits for its last notification to be sent."""

log = logging.getLogger("lorry.notifier")
WORKER_TASKS = (TaskKind.IMPORT, TaskKind.PLAN, TaskKind.PREPARATION, TaskKind.EXPORT, TaskKind.LOAD)


class Notifier(Protocol):
    """Notifies workers after a commit that creates work."""

    def wake_workers(self) -> None:
        """Notify workers that there may be work. Returns immediately and never raises."""
        ...

    def close(self) -> None:
        """Send a pending notification, unless that takes longer than CLOSE_SECONDS."""
        ...


def open_notifier(settings: Settings) -> Notifier:
    """Open a notifier for Redis if the settings name one, else for the file that this data folder's workers poll."""
    redis_url = settings.resolved_redis_url()
    return RedisNotifier(redis_url) if redis_url else FileNotifier(settings.notification_path())


class FileNotifier:
    """A notifier for one machine: a file whose modification time is the time of the last notification.

    Idle workers check the file often, which costs microseconds, and poll the database rarely.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last_seen = self._notified_at()

    def wake_workers(self) -> None:
        with suppress(OSError):  # for example a full disk: workers find the work at their next database poll
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch()

    def was_notified(self) -> bool:
        """Whether there was a notification since the last call, or since this object was created."""
        before, self._last_seen = self._last_seen, self._notified_at()
        return self._last_seen != before

    def close(self) -> None:
        return

    def _notified_at(self) -> int:
        """The time of the last notification in nanoseconds, or 0 before the first one."""
        try:
            return self._path.stat().st_mtime_ns
        except OSError:
            return 0


class RedisNotifier:
    """Sends the task `lorry.work` through Celery.

    Notifications that arrive while one is being sent are merged. None is sent while MAX_QUEUED messages wait.
    """

    def __init__(self, redis_url: str, *, first_wait_seconds: float = FIRST_WAIT_SECONDS) -> None:
        self._redis_url = redis_url
        self._first_wait_seconds = first_wait_seconds
        self._changed = threading.Condition()
        self._is_pending = False
        self._closing = False
        self._thread: threading.Thread | None = None

    def wake_workers(self) -> None:
        with self._changed:
            if self._closing:
                return
            self._is_pending = True
            self._changed.notify()
            if self._thread is None:  # started at the first notification, so that a process may fork before it
                self._thread = threading.Thread(target=self._relay, name="lorry-notifier", daemon=True)
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
        while self._consume():
            try:
                with app.producer_or_acquire() as producer:
                    # kombu adds the key prefix to llen, as it does when it sends
                    if producer.channel.client.llen(QUEUE) < MAX_QUEUED:
                        app.send_task(TASK, producer=producer, queue=QUEUE, retry=False, ignore_result=True)
                wait_seconds = self._first_wait_seconds
            except Exception as error:  # noqa: BLE001  (whatever failed, workers find the work by polling)
                log.warning("Sending a notification to Redis failed (%s). Workers poll for work.", type(error).__name__)
                self._restore(wait_seconds)
                wait_seconds = min(2 * wait_seconds, LONGEST_WAIT_SECONDS)
        app.close()

    def _consume(self) -> bool:
        """Wait for a notification and consume it. Returns False when closing and no notification is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_pending or self._closing)
            was_pending, self._is_pending = self._is_pending, False
            return was_pending

    def _restore(self, wait_seconds: float) -> None:
        """Wait before the retry, and restore the notification. A notifier that is closing drops it."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing, timeout=wait_seconds)
            self._is_pending = not self._closing


def _sender(redis_url: str) -> Any:
    # A late import: a process that never sends a notification does not load Celery.
    from celery import Celery  # pyright: ignore[reportMissingTypeStubs]

    app: Any = Celery("lorry-notifier", broker=redis_url, set_as_current=False)
    app.conf.update(
        task_ignore_result=True,
        result_backend=None,
        task_serializer="json",
        broker_transport_options={**TRANSPORT_OPTIONS, "max_retries": 1},
    )
    return app


def has_work(db: Database) -> bool:
    """Whether there is work that an idle worker could start now."""
    with db.read() as session:
        now = read_clock(session)
        is_due = or_(Job.run_after.is_(None), Job.run_after <= now)
        jobs = select(Job.id).where(Job.state == JobState.QUEUED, ~Job.is_held, is_due).limit(1)
        tasks = task_queue.due(WORKER_TASKS, now=now).limit(1)
        return any(session.scalar(some) is not None for some in (jobs, tasks))
