"""Messages of queue streams. One poll serves all listeners that see the same part of the queue."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Hashable, Mapping
from typing import Any, cast

from api.schemas.fleet import QueueObject
from api.streaming.hub import Found, Topic
from api.streaming.sse import message
from catalog.db.database import Database
from catalog.history import changes
from catalog.queue import listing
from catalog.scheduling.snapshot import Policy

QUIET_SECONDS = 2.0
"""Interval of reading the queue while no job has a new event: waiting times and workers still change."""
FRESH_SECONDS = 0.5
"""Maximum age of a snapshot with which a new listener starts."""


class QueueSource:
    """Polls queues. Keys are the project whose jobs are visible; None: all projects."""

    def __init__(self, db: Database, policy: Policy) -> None:
        self._db = db
        self._policy = policy
        self._lock = threading.Lock()
        self._newest: dict[str | None, tuple[float, Found]] = {}

    def begin(self, project_id: str | None) -> Found:
        """Return the queue for a new listener. Concurrent callers share one read."""
        with self._lock:
            polled_at, found = self._newest.get(project_id, (0.0, None))
            if found is None or time.monotonic() - polled_at > FRESH_SECONDS:
                found = self._poll(project_id, newest=0)
                if len(self._newest) > 1000:
                    self._newest.clear()
                self._newest[project_id] = (time.monotonic(), found)
            return found

    def poll(self, topics: Mapping[Hashable, Topic]) -> dict[Hashable, Found]:
        found: dict[Hashable, Found] = {}
        newest = changes.newest_event(self._db)
        for key, topic in topics.items():
            if isinstance(topic.cursor, _Cursor) and topic.cursor.serves(newest):
                continue
            update = self._poll(cast(str | None, key), newest=newest)
            if update.view == topic.view and topic.cursor is not None:
                update = Found(cursor=update.cursor)
            found[key] = update
        return found

    def _poll(self, project_id: str | None, *, newest: int) -> Found:
        snapshot = listing.snapshot(self._db, project_id=project_id, policy=self._policy)
        serialized = message("queue", QueueObject.model_validate(snapshot).model_dump_json())
        view = json.dumps(_without_clock(snapshot), sort_keys=True)
        return Found(view=view, view_message=serialized, cursor=_Cursor(newest))


class _Cursor:
    def __init__(self, newest: int) -> None:
        self._newest = newest
        self._until = time.monotonic() + QUIET_SECONDS

    def serves(self, newest: int) -> bool:
        return newest == self._newest and time.monotonic() < self._until


def _without_clock(snapshot: dict[str, Any]) -> dict[str, Any]:
    """Return the snapshot without values that change only because time passes."""
    jobs = [{**entry, "waited_seconds": None, "reason": None} for entry in snapshot["jobs"]]
    return {**snapshot, "as_of": None, "jobs": jobs}
