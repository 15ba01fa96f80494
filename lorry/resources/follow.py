"""Follows one job by server-sent events, and by polling whenever the stream is interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from lorry.errors import APIError, ConnectionFailed, ServerFailed
from lorry.models import Job, JobEvent
from lorry.transport import sse
from lorry.transport.http import Transport


@dataclass(frozen=True, kw_only=True)
class JobUpdate:
    """A message of a job's live stream."""

    kind: str
    """job, event or metric: the only one of the last three fields that is set."""
    id: str = ""
    """ID of the message, after which a new stream can continue. Empty if it has none."""
    job: Job | None = None
    """The job with its new status or progress."""
    event: JobEvent | None = None
    """A new event of the job."""
    metric: dict[str, Any] | None = None
    """A new point of a curve, as in `jobs.metrics`."""


def stream(transport: Transport, path: str, last_event_id: str | None) -> Iterator[JobUpdate]:
    """Yield the updates of one connection, starting after `last_event_id`."""
    headers = {"accept": "text/event-stream"}
    if last_event_id:
        headers["last-event-id"] = last_event_id
    with transport.stream(path, headers=headers) as response:
        for event in sse.parse(response.iter_bytes(), url=str(response.url)):
            update = _update(event)
            if update is not None:
                yield update


def follow(
    open_stream: Callable[[str | None], Iterator[JobUpdate]],
    get_job: Callable[[], Job],
    *,
    last_event_id: str | None = None,
    sleep: Callable[[float], None],
    clock: Callable[[], float],
    poll_seconds: float,
    patience_seconds: float,
) -> Iterator[JobUpdate]:
    """Yield updates; the last one is that in which the job is final.

    Raises ConnectionFailed or ServerFailed if the service has not answered successfully for `patience_seconds`.
    """
    heard_at = clock()
    while True:
        try:
            for update in open_stream(last_event_id):
                last_event_id, heard_at = update.id or last_event_id, clock()
                yield update
                if update.job is not None and update.job.is_final:
                    return
        except (ConnectionFailed, APIError) as error:
            if isinstance(error, APIError) and error.status < 500 and error.status not in {404, 408, 429}:
                raise
        try:
            job = get_job()
        except (ConnectionFailed, ServerFailed):
            if clock() - heard_at > patience_seconds:
                raise
        else:
            heard_at = clock()
            yield JobUpdate(kind="job", job=job)
            if job.is_final:
                return
        sleep(poll_seconds)


def _update(event: sse.ServerEvent) -> JobUpdate | None:
    """Return the update; None for an unknown event, which a newer service may send."""
    try:
        parsed: object = json.loads(event.data)
    except ValueError:
        return None
    if not isinstance(parsed, dict):
        return None
    data = cast("dict[str, Any]", parsed)
    match event.event:
        case "job":
            return JobUpdate(kind="job", id=event.id, job=Job.of(data))
        case "event":
            return JobUpdate(kind="event", id=event.id, event=JobEvent.of(data))
        case "metric":
            return JobUpdate(kind="metric", id=event.id, metric=data)
        case _:
            return None
