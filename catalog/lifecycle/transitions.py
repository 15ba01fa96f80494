"""The one place that writes a job's state: by the table of transitions, with an event in the same transaction.

Whatever else depends on a job's state is an observer (OBSERVERS). Callers: users' actions (catalog/jobs, position.py),
claiming and claims (catalog/queue), preparation.py and outcomes.py.
"""

from __future__ import annotations

from typing import Protocol

from sqlalchemy.orm import Session

from catalog.db import lease
from catalog.errors import Conflict
from catalog.history import events, tracker_exports
from catalog.search import trials
from catalog.states import FINAL_STATES, EndReason, JobState, Verb, next_state
from catalog.tables.jobs import Job
from catalog.usage import ledger
from catalog.webhooks import outbox


class Observer(Protocol):
    """Called after each transition of a job, in its transaction. `job.state` is the new state."""

    def __call__(self, session: Session, job: Job, before: JobState | None, *, now: float) -> None: ...


OBSERVERS: tuple[Observer, ...] = (
    ledger.on_transition,
    trials.on_transition,
    tracker_exports.on_transition,
    outbox.on_transition,
)
"""`trials` locks the sweep, and then `tracker_exports` its row of the job: all transactions lock in this order. The
other two lock nothing here. A list rather than a registry: an observer whose module a process forgot to import would be
left out silently."""


def begin(session: Session, job: Job, *, now: float, message: str) -> None:
    """Store a new job in its first state."""
    after = next_state(None, Verb.CREATE)
    assert after is not None
    job.state = after
    session.add(job)
    session.flush()  # what is told of it names it
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
    """Take the job where `verb` leads from its state. Raises Conflict where the table has no such move."""
    before = JobState(job.state)
    after = next_state(before, verb)
    if after is None:
        raise Conflict(
            f"A job that is {before} can't {verb.value.replace('_', ' ')}.",
            code="invalid_transition",
            remedy="Look at its state and at its events.",
        )
    job.state = after
    job.is_held = job.is_held and after in (JobState.VALIDATING_FILES, JobState.QUEUED)
    job.queued_at = now if after is JobState.QUEUED and not job.is_held else None
    job.preemption_requested_at = None
    if after is not JobState.RUNNING:
        _let_go(job, after)
    if reason is not None:
        job.reason = reason
    if after in FINAL_STATES:
        job.finished_at = now
    _record(session, job, verb, before=before, reason=reason, now=now, message=message, level=level)
    return after


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
    for observe in OBSERVERS:
        observe(session, job, before, now=now)


def _let_go(job: Job, after: JobState) -> None:
    """Whoever held the job writes nothing more. A finished job keeps the names of where it trained last."""
    lease.release(job)
    job.lease_extended = False
    job.run_after = None
    job.cancel_requested = False
    job.pause_requested = False
    job.preempted_for = None
    if after not in FINAL_STATES:
        job.worker_id = None
        job.trainer_id = None
