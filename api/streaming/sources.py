"""Messages of streams: of a job, for a client that catches up and for all that follow it, and of the queue."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast

from api.job_objects import job_objects
from api.schemas.fleet import QueueObject
from api.schemas.job_history import event_object, metric_point
from api.schemas.jobs import FineTuningJob, job_object
from api.streaming.hub import Found, Topic
from api.streaming.sse import message
from catalog.caller import Caller
from catalog.db.database import Database
from catalog.history import changes
from catalog.history.changes import WatchedJob
from catalog.history.metric_points import Point
from catalog.queue import listing
from catalog.scheduling.snapshot import Policy
from catalog.states import FINAL_STATES
from catalog.tables.history import JobEvent
from catalog.tables.jobs import Job

QUIET_SECONDS = 2.0
"""Interval of reading the queue while no job has a new event: waiting times and workers still change."""
FRESH_SECONDS = 0.5
"""Maximum age of a snapshot with which a new listener starts."""


class JobWatch:
    """The polls of one listener, page by page."""

    def __init__(self, db: Database, cursor: changes.Cursor, caller: Caller) -> None:
        self._db = db
        self._caller = caller
        self._cursor = cursor
        self._shown: FineTuningJob | None = None
        self.num_events = 0

    @classmethod
    def start(cls, db: Database, *, caller: Caller, job_id: str, last_seen: int | None) -> tuple[JobWatch, Found]:
        """Return the watch and the result of its first poll. Raises NotFound."""
        cursor = changes.start(db, project_id=caller.project_id, job_id=job_id, last_seen=last_seen)
        watch = cls(db, cursor, caller)
        return watch, watch.poll()

    def poll(self) -> Found:
        """Return points and events in the order in which they were written, then the job if it has changed. So a final
        job comes after all its events, and a client with an event's id has all points that were written before it."""
        found = changes.poll(self._db, self._cursor)
        self.num_events += len(found.events)
        parts = _messages(found.items)
        if found.has_more:
            return Found(seq=self._cursor.seq, parts=parts, has_more=True)
        serialized, view = b"", _comparable_view(found.job)
        if view != self._shown:
            self._shown = view
            serialized = _serialized(self._db, [found.job], self._caller)[found.job.id]
        is_last = found.job.state in FINAL_STATES
        return Found(seq=self._cursor.seq, parts=parts, view=view, view_message=serialized, is_last=is_last)


class JobSource:
    """Polls all watched jobs together. Keys are (project, job)."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def poll(self, topics: Mapping[Hashable, Topic]) -> dict[Hashable, Found]:
        watched = {cast(tuple[str, str], key): topic for key, topic in topics.items()}
        polled = changes.poll_many(self._db, {key: _seen(topic) for key, topic in watched.items()})
        views: dict[str, FineTuningJob] = {}
        to_send: list[Job] = []
        for key, change in polled.items():
            if change is None or change.has_more:
                continue
            view = views[change.job.id] = _comparable_view(change.job)
            if watched[key].cursor is None or view != watched[key].view:
                to_send.append(change.job)
        serialized = _serialized(self._db, to_send)
        found: dict[Hashable, Found] = {}
        for key, change in polled.items():
            if change is None:
                found[key] = Found(seq=watched[key].seq, is_last=True)
                continue
            found[key] = Found(
                seq=change.seen.seq,
                cursor=change.seen,
                parts=_messages(change.items),
                view=views.get(change.job.id),
                view_message=serialized.get(change.job.id, b""),
                is_last=not change.has_more and change.job.state in FINAL_STATES,
            )
        return found


def _seen(topic: Topic) -> WatchedJob:
    return topic.cursor if isinstance(topic.cursor, WatchedJob) else WatchedJob(seq=topic.seq)


def _messages(items: Sequence[JobEvent | Point]) -> list[tuple[int, bytes]]:
    return [(item.seq, _message(item)) for item in items]


def _message(item: JobEvent | Point) -> bytes:
    if isinstance(item, Point):
        return message("metric", metric_point(item).model_dump_json())
    return message("event", event_object(item).model_dump_json(), ident=item.seq)


def _serialized(db: Database, rows: Sequence[Job], caller: Caller | None = None) -> dict[str, bytes]:
    objects = job_objects(db, rows, caller=caller) if rows else []
    return {row.id: message("job", job.model_dump_json()) for row, job in zip(rows, objects, strict=True)}


def _comparable_view(row: Job) -> FineTuningJob:
    """Return a view for comparison that needs no further query. It omits values that change every second: the
    estimated finish and the running time."""
    job = job_object(row, organization_id="", adapter_id=None, seconds_running=0.0)
    return job.model_copy(update={"estimated_finish": None})


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
