"""The outbox: deliveries of events to the endpoints of a project, written in the transaction that causes the event."""

from __future__ import annotations

from typing import Any, Literal, get_args

from sqlalchemy import Row, select
from sqlalchemy.orm import Session

from catalog.states import JobState
from catalog.tables.jobs import Job
from catalog.tables.table import Json, new_id
from catalog.tables.webhooks import WebhookDelivery, WebhookEndpoint
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskKind


def on_transition(session: Session, job: Job, before: JobState | None, *, now: float) -> None:
    """Write the deliveries for a job that has finished."""
    event_type = JOB_EVENT_TYPES.get(JobState(job.state))
    if event_type is not None:
        add(session, project_id=job.project_id, event_type=event_type, data={"id": job.id}, now=now)


def endpoint_disabled(session: Session, endpoint: WebhookEndpoint, *, now: float) -> None:
    """Write the deliveries that notify the project's other endpoints."""
    details = {"id": endpoint.id}
    add(session, project_id=endpoint.project_id, event_type="webhook_endpoint.disabled", data=details, now=now)


def add(session: Session, *, project_id: str, event_type: EventType, data: Json, now: float) -> None:
    """Write one delivery for each endpoint that subscribes to the event type.

    The delivery of a disabled endpoint is stored as failed, so that it can be replayed.
    """
    # Only these columns: workers have no permission to read the others.
    own = select(WebhookEndpoint.id, WebhookEndpoint.event_types, WebhookEndpoint.disabled_at)
    own = own.where(WebhookEndpoint.project_id == project_id, WebhookEndpoint.deleted_at.is_(None))
    with session.no_autoflush:
        asked = [endpoint for endpoint in session.execute(own) if _asks(endpoint, event_type, data)]
    event_id = new_id("evt")
    for endpoint in asked:
        is_open = endpoint.disabled_at is None
        session.add(
            WebhookDelivery(
                id=new_id("delivery"),
                endpoint_id=endpoint.id,
                event_id=event_id,
                event_type=event_type,
                event_at=now,
                data=data,
                created_at=now,
                status="pending" if is_open else "failed",
                is_test=False,
                num_tries=0,
                num_tries_before=0,
                next_try_at=now if is_open else None,
                ended_at=None if is_open else now,
            )
        )
        if is_open:
            wake(session, endpoint.id, project_id=project_id, now=now)


def wake(session: Session, endpoint_id: str, *, project_id: str, now: float) -> None:
    """Make the task of an endpoint due, which has due deliveries."""
    task_queue.add_at_the_end(session, TaskKind.WEBHOOK, endpoint_id, project_id=project_id, run_after=now)


def _asks(endpoint: Row[str, list[Any], float | None], event_type: EventType, data: Json) -> bool:
    """Return whether the endpoint subscribes to the event type, and the event is not about the endpoint itself."""
    return event_type in endpoint.event_types and data.get("id") != endpoint.id


EventType = Literal[
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
    "webhook_endpoint.disabled",
]
EVENT_TYPES: tuple[EventType, ...] = get_args(EventType)
JOB_EVENT_TYPES: dict[JobState, EventType] = {
    JobState.SUCCEEDED: "fine_tuning.job.succeeded",
    JobState.FAILED: "fine_tuning.job.failed",
    JobState.CANCELLED: "fine_tuning.job.cancelled",
}
"""The event type for each final state of a job."""
SAMPLE_IDS: dict[EventType, str] = {
    **dict.fromkeys(JOB_EVENT_TYPES.values(), "ftjob-of-a-test"),
    "webhook_endpoint.disabled": "webhook-of-a-test",
}
"""The id in a test event, by type. No object has these ids."""
