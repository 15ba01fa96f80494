"""One watcher's view of a job, look by look, in wire form."""

from __future__ import annotations

from api.feed import Found
from api.job_objects import job_objects
from api.schemas.job_history import event_object, metric_point
from api.schemas.jobs import FineTuningJob, job_object
from api.sse import message
from catalog import watching
from catalog.db import Database
from catalog.states import FINAL_STATES
from catalog.tables import Job


class JobWatch:
    def __init__(self, db: Database, mark: watching.Mark) -> None:
        self._db = db
        self._mark = mark
        self._shown: FineTuningJob | None = None
        self.told_events = 0

    @classmethod
    def start(cls, db: Database, *, project_id: str, job_id: str, last_seen: int | None) -> JobWatch:
        """Raises NotFound."""
        return cls(db, watching.start(db, project_id=project_id, job_id=job_id, last_seen=last_seen))

    def look(self) -> Found:
        """Points, then events, then the job if it has changed: a final job comes after all that led to it, and who
        has an event's id has the points that were written before it."""
        news = watching.look(self._db, self._mark)
        self.told_events += len(news.events)
        messages = [message("metric", metric_point(row).model_dump_json()) for row in news.points]
        messages += [message("event", event_object(row).model_dump_json(), ident=row.seq) for row in news.events]
        if news.has_more:
            return Found(messages=messages)
        return Found(messages=messages + self._job_if_changed(news.job), is_last=news.job.state in FINAL_STATES)

    def _job_if_changed(self, row: Job) -> list[bytes]:
        shown = _of_its_row(row)
        if shown == self._shown:
            return []
        self._shown = shown
        (whole,) = job_objects(self._db, [row])
        return [message("job", whole.model_dump_json())]


def _of_its_row(row: Job) -> FineTuningJob:
    """To compare, by no query more. What moves with every second is no news: the estimate, the time it has run."""
    job = job_object(row, adapter_id=None, seconds_running=0.0)
    return job.model_copy(update={"estimated_finish": None})
