"""What events there are: one table. A type that is added here can be asked for, and sent by `outbox.add`."""

from __future__ import annotations

from typing import Literal, get_args

from catalog.states import JobState

EventType = Literal[
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
    "webhook_endpoint.disabled",
]
EVENT_TYPES: tuple[EventType, ...] = get_args(EventType)
OF_JOBS: dict[JobState, EventType] = {
    JobState.SUCCEEDED: "fine_tuning.job.succeeded",
    JobState.FAILED: "fine_tuning.job.failed",
    JobState.CANCELLED: "fine_tuning.job.cancelled",
}
"""What is told once a job is there."""
SAMPLE_IDS: dict[EventType, str] = {
    **dict.fromkeys(OF_JOBS.values(), "ftjob-of-a-test"),
    "webhook_endpoint.disabled": "webhook-of-a-test",
}
"""What a test says that its event is about: something that nobody has."""
