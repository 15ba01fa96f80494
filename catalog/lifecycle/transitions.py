"""Writes a job's state. No other code does: it applies the table of transitions and adds an event.

Other code that depends on a job's state is an observer (OBSERVERS). Callers: users' actions (catalog/jobs), claiming
and claims (catalog/queue), preparation.py and outcomes.py.
"""

from __future__ import annotations

from typing import Protocol

from sqlalchemy.orm import Session

from catalog.db import lease
from catalog.errors import Conflict
from catalog.history import events, tracker_runs
from catalog.lifecycle import trials
from catalog.states import FINAL_STATES, EndReason, JobState, Verb, next_state
from catalog.tables.jobs import Job
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskKind
from catalog.usage import ledger
from catalog.webhooks import outbox


class Observer(Protocol):
    """Called after each transition of a job, in its transaction. `job.state` is the new state."""

    def __call__(self, session: Session, job: Job, before: JobState | None, *, now: float) -> None: ...


OBSERVERS: tuple[Observer, ...] = (
    ledger.on_transition,
    trials.on_transition,
    tracker_runs.on_transition,
    outbox.on_transition,
)
"""`trials` locks the sweep, and then `tracker_runs` locks its row of the job: all transactions lock in this order.
The other two take no locks here. A list rather than a registry: a registry would silently skip an observer whose module
was not imported in a process."""


def begin(session: Session, job: Job, *, now: float, message: str) -> None:
    """Store a new job in its first state."""
    after = next_state(None, Verb.CREATE)
    assert after is not None
    job.state = after
    session.add(job)
    session.flush()  # rows that the observers write refer to it
    _record(session, job, Verb.CREATE, before=None, now=now, message=message)


def move(
    session: Session,
    job: Job,
    verb: Verb,
    *,
    now: float,
    message: str,
    reason: EndReason | None = None,
    level: events.Level = "info",
) -> JobState:
    """Apply `verb` to the job and return its new state. Raises Conflict if the table has no such transition."""
    before = JobState(job.state)
    after = next_state(before, verb)
    if after is None:
        if before in FINAL_STATES:
            raise Conflict("finished_job_unchangeable", action=verb.value.replace("_", " "), job=job.id, before=before)
        raise Conflict(
            "invalid_transition",
            action=verb.value.replace("_", " "),
            job=job.id,
            before=before,
            allowed=_allowed(before),
        )
    job.state = after
    job.is_held = job.is_held and after in (JobState.VALIDATING_FILES, JobState.QUEUED)
    job.queued_at = now if after is JobState.QUEUED and not job.is_held else None
    job.preemption_requested_at = None
    if after is not JobState.RUNNING:
        _release_claim(job, after)
    if reason is not None:
        job.reason = reason
    if after in FINAL_STATES:
        job.finished_at = now
    _record(session, job, verb, before=before, reason=reason, now=now, message=message, level=level)
    return after


def _allowed(state: JobState) -> str:
    """Return the actions that a user may request for an unfinished job."""
    return "resume or cancel" if state is JobState.PAUSED else "pause or cancel"


def _record(
    session: Session,
    job: Job,
    verb: Verb,
    *,
    before: JobState | None,
    now: float,
    message: str,
    reason: EndReason | None = None,
    level: events.Level = "info",
) -> None:
    data = {"from": before, "to": job.state, "verb": verb, "reason": reason}
    events.add(session, job.id, now=now, message=message, level=level, type="transition", data=data)
    if before is JobState.VALIDATING_FILES:
        task_queue.remove(session, TaskKind.PREPARATION, job.id)
    if job.state == JobState.VALIDATING_FILES:
        kind, project_id = TaskKind.PREPARATION, job.project_id
        task_queue.add(session, kind, job.id, project_id=project_id, run_after=now, priority=job.priority)
    for observe in OBSERVERS:
        observe(session, job, before, now=now)


def _release_claim(job: Job, after: JobState) -> None:
    """Release the claim, so that its worker can't write any more. A finished job keeps its worker and trainer ids."""
    lease.release(job)
    job.lease_extended = False
    job.run_after = None
    job.cancel_requested = False
    job.pause_requested = False
    job.preempted_for = None
    if after not in FINAL_STATES:
        job.worker_id = None
        job.trainer_id = None
