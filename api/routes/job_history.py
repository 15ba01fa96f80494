"""The history of a job (events, logs, checkpoints, metrics, attempts) and its live stream."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from fastapi import Header, Query
from starlette.responses import Response, StreamingResponse

from api.auth.authentication import Recheck, Signed
from api.deps import After, Limit, Use
from api.rate_limits.threads import run_route
from api.requests.parameters import JobId
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.job_history import (
    EVENT_PREFIX,
    AttemptObject,
    FineTuningJobCheckpoint,
    FineTuningJobEvent,
    JobDataReport,
    LogLine,
    MetricPoint,
    WhyObject,
    attempt_object,
    checkpoint_object,
    event_object,
    log_line,
    metric_point,
)
from api.schemas.pagination import ListPage, page_of
from api.streaming.hub import LiveStream, Subscription
from api.streaming.sources import JobWatch
from api.streaming.sse import last_event_id
from catalog.errors import InvalidRequest
from catalog.history import job_logs, queries
from catalog.history.events import ShownType
from catalog.jobs import data_reports, explanation
from catalog.scheduling.snapshot import Policy

MAX_NUMBER = 999_999_999
router = Router(prefix="/v1/fine_tuning/jobs/{job_id}", tags=["fine-tuning jobs"], responses={**SIGNED, **errors(404)})


@router.get("/events", operation_id="list_job_events")
def list_job_events(
    job_id: JobId,
    use: Use,
    caller: Signed,
    *,
    after: After = None,
    limit: Limit = 20,
    type: Annotated[ShownType | None, Query(description="Return only events of this type.")] = None,  # noqa: A002  (the API's parameter name)
) -> ListPage[FineTuningJobEvent]:
    """List the job's events, newest first. Requires the scope `jobs:read`."""
    page = queries.events_page(
        use.db, project_id=caller.project_id, job_id=job_id, after=event_seq(after), limit=limit, type=type
    )
    return page_of([event_object(row) for row in page.items], has_more=page.has_more)


@router.get("/logs", operation_id="list_job_logs")
def list_job_logs(
    job_id: JobId,
    use: Use,
    caller: Signed,
    *,
    attempt: Annotated[int | None, Query(ge=1, le=MAX_NUMBER, description="Return only lines of this attempt.")] = None,
    rank: Annotated[
        int | None, Query(ge=0, le=MAX_NUMBER, description="Return only lines of this rank (trainer process).")
    ] = None,
    contains: Annotated[
        str | None,
        Query(min_length=1, max_length=200, description="Return only lines that contain this text; ignores case."),
    ] = None,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Maximum number of lines to return, 1 to 1,000.")] = 100,
) -> ListPage[LogLine]:
    """List the log lines of the job's trainers, oldest attempt first.

    Lines of a running job appear within a minute. Logs are kept for 30 days after the job has finished. Requires the
    scope `jobs:read`.
    """
    page = job_logs.lines(
        use.db,
        use.store,
        project_id=caller.project_id,
        job_id=job_id,
        attempt=attempt,
        rank=rank,
        contains=contains,
        after=after,
        limit=limit,
    )
    return page_of([log_line(line) for line in page.items], has_more=page.has_more)


@router.get("/checkpoints", operation_id="list_job_checkpoints")
def list_job_checkpoints(
    job_id: JobId, use: Use, caller: Signed, after: After = None, limit: Limit = 10
) -> ListPage[FineTuningJobCheckpoint]:
    """List the job's checkpoints, newest first, including those whose files are no longer kept.

    Requires the scope `jobs:read`.
    """
    page = queries.checkpoints_page(use.db, project_id=caller.project_id, job_id=job_id, after=after, limit=limit)
    steps = [row.step for row in page.items]
    points = queries.points_at(use.db, project_id=caller.project_id, job_id=job_id, steps=steps)
    shown = [
        checkpoint_object(row, train=points.get(("train", row.step)), valid=points.get(("valid", row.step)))
        for row in page.items
    ]
    return page_of(shown, has_more=page.has_more)


@router.get("/metrics", operation_id="get_job_metrics")
def get_job_metrics(
    job_id: JobId,
    use: Use,
    caller: Signed,
    kind: Annotated[
        Literal["train", "valid"], Query(description="The curve of the training file or of the validation file.")
    ] = "train",
    max_points: Annotated[
        int, Query(ge=4, le=10_000, description="Maximum number of points. Longer curves are thinned; peaks are kept.")
    ] = 2000,
) -> ListPage[MetricPoint]:
    """Return one curve of the job, training or validation, by step. Requires the scope `jobs:read`."""
    rows = queries.metrics(use.db, project_id=caller.project_id, job_id=job_id, kind=kind, max_points=max_points)
    return ListPage[MetricPoint](data=[metric_point(row) for row in rows])


@router.get("/why", operation_id="explain_job")
def explain_job(job_id: JobId, use: Use, caller: Signed) -> WhyObject:
    """Explain the job's state: what it waits for, its queue position, and where it could run.

    Requires the scope `jobs:read`.
    """
    return WhyObject.model_validate(
        explanation.explain(
            use.db,
            project_id=caller.project_id,
            job_id=job_id,
            policy=Policy.of(use.settings),
            sees_all=caller.is_operator,
        )
    )


@router.get("/data_report", operation_id="get_job_data_report")
def get_job_data_report(job_id: JobId, use: Use, caller: Signed) -> JobDataReport:
    """Return the numbers of rows and tokens, and of truncated and skipped rows, of the training and validation files.

    Requires the scope `jobs:read`.
    """
    reports = data_reports.of_job(use.db, project_id=caller.project_id, job_id=job_id)
    return JobDataReport(job_id=job_id, training=reports.training, validation=reports.validation)


@router.get("/attempts", operation_id="list_job_attempts")
def list_job_attempts(job_id: JobId, use: Use, caller: Signed) -> ListPage[AttemptObject]:
    """List the job's attempts (claims by a worker), oldest first. Requires the scope `jobs:read`."""
    rows = queries.attempts(use.db, project_id=caller.project_id, job_id=job_id)
    packmates = queries.packmates(use.db, project_id=caller.project_id, job_id=job_id)
    shown = [attempt_object(row, packmates=packmates.get(row.claim_id, [])) for row in rows]
    return ListPage[AttemptObject](data=shown)


@router.get(
    "/stream",
    operation_id="stream_job",
    response_class=StreamingResponse,
    responses={
        200: {
            "content": {"text/event-stream": {}},
            "description": "Server-sent events named `job`, `event` and `metric`.",
        },
        204: {"description": "The job is final and the client has received everything: don't reconnect."},
    },
)
async def stream_job(
    job_id: JobId,
    use: Use,
    caller: Signed,
    recheck: Recheck,
    last_seen: Annotated[
        str | None,
        Header(
            alias="last-event-id", description="ID of the last received event. Omitted: start with the first event."
        ),
    ] = None,
) -> Response:
    """Stream the job, its events and its metrics as server-sent events.

    With Last-Event-ID, the stream starts after that event and repeats no event and no metric point. Without it, the
    stream starts with the first event, and with the metrics of the last few seconds; read older metrics once with
    `/metrics`. The job is sent each time it changes. The stream ends after the job's final state; a client that then
    reconnects gets 204. Requires the scope `jobs:read`.
    """
    seen = last_event_id(last_seen)
    start = partial(JobWatch.start, use.db, caller=caller, job_id=job_id, last_seen=seen)
    watcher, first = await run_route(caller.project_id, start)
    if seen is not None and first.is_last and not watcher.num_events:
        return Response(status_code=204)
    key = (caller.project_id, job_id)
    listener = Subscription(source=use.job_source, key=key, poll=watcher.poll, signed=recheck.holder)
    return LiveStream(use.feed, listener, first, recheck.identify)


def event_seq(after: str | None) -> int | None:
    """Return the number in an event's id. Raises InvalidRequest."""
    if after is None:
        return None
    number = after.removeprefix(EVENT_PREFIX)
    if not (number.isascii() and number.isdecimal() and len(number) < 19):
        raise InvalidRequest("unknown_event_cursor", after=after[:80], param="after")
    return int(number)
