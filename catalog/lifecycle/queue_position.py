"""Changes the order of a project's jobs of the same class: moves, deadlines and holds.

A place is a number on the job's row; the lowest goes first. This module never changes a job's state.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Literal

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from catalog.audit import log
from catalog.audit.log import AuditType
from catalog.db.database import Database, read_clock, serialize
from catalog.errors import Conflict, InvalidRequest
from catalog.history import events
from catalog.history.queries import find
from catalog.states import FINAL_STATES, JobState, PriorityClass
from catalog.tables.jobs import Job

BEFORE_ALL = 1e10
"""Subtracted from a time, gives a place ahead of all jobs without a deadline."""
WAITING = (JobState.VALIDATING_FILES, JobState.QUEUED)
LATEST_JOBS = 50
"""Number of a project's latest jobs from which the duration of a step is estimated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MoveTarget:
    """The requested position of a job. Exactly one field is set."""

    before: str | None = None
    after: str | None = None
    to: Literal["first", "last"] | None = None


def of_new(now: float, deadline: float | None) -> float:
    """Return the place of a new job: by its deadline if it has one, and else behind all other jobs."""
    return now if deadline is None else deadline - BEFORE_ALL


def settle(session: Session, job: Job) -> None:
    """Store when the job must start to meet its deadline, once its number of steps is known.

    Also updates its place, unless a user has moved the job.
    """
    if job.deadline is None:
        return
    was_moved = job.place != (of_new(job.created_at, job.deadline) if job.needed_start is None else _due(job))
    job.needed_start = job.deadline - _expected_seconds(session, job)
    if not was_moved:
        job.place = _due(job)


def hold(db: Database, *, project_id: str, job_id: str) -> Job:
    """Hold a waiting job: it is not scheduled until it is released. Idempotent."""
    with db.write() as session:
        job = find(session, project_id, job_id, locked=True)
        _check_waits(job, "held")
        if not job.is_held:
            now = read_clock(session)
            job.is_held, job.queued_at = True, None
            _note(session, "job.held", job, now=now, message="The job is held. It does not start until it is released.")
        return job


def release(db: Database, *, project_id: str, job_id: str) -> Job:
    """Release a held job for scheduling. Its waiting time restarts now, but it keeps its place. Idempotent."""
    with db.write() as session:
        job = find(session, project_id, job_id, locked=True)
        _check_waits(job, "released")
        if job.is_held:
            now = read_clock(session)
            job.is_held = False
            job.queued_at = now if job.state == JobState.QUEUED else None
            _note(session, "job.released", job, now=now, message="The job was released.")
        return job


def move_to(db: Database, *, project_id: str, job_id: str, target: MoveTarget) -> Job:
    """Move the job among its project's waiting jobs of the same class. Other projects' jobs are not affected."""
    neighbor_id = target.before or target.after
    _check_target(job_id, target)
    with db.write() as session:
        serialize(session, f"places of {project_id}")
        both = select(Job.id).where(Job.id.in_((job_id, neighbor_id)), Job.project_id == project_id)
        session.scalars(both.order_by(Job.id).with_for_update()).all()
        job = find(session, project_id, job_id)
        _check_waits(job, "moved")
        if neighbor_id is not None:
            _check_alike(job, find(session, project_id, neighbor_id), param=_field(target))
        job.place = _place(session, job, target)
        _note(session, "job.moved", job, now=read_clock(session), message=_move_message(target))
        return job


def _check_target(job_id: str, target: MoveTarget) -> None:
    names = [name for name in ("before", "after", "to") if getattr(target, name) is not None]
    if len(names) != 1:
        found = " and ".join(map(repr, names)) if len(names) < 3 else "all of them"
        if names:
            raise InvalidRequest("several_queue_places", found=found, param=names[-1] if names else None)
        raise InvalidRequest("no_queue_place", param=names[-1] if names else None)
    if job_id in (target.before, target.after):
        raise InvalidRequest("queue_place_next_to_itself", job_id=job_id, field=_field(target), param=_field(target))


def _note(session: Session, type: AuditType, job: Job, *, now: float, message: str) -> None:  # noqa: A002
    log.note(session, type, now=now, object_id=job.id, project_id=job.project_id, details={"message": message})
    events.add(session, job.id, now=now, message=message)


def _place(session: Session, job: Job, target: MoveTarget) -> float:
    found = _between(session, job, target)
    if found is None:  # no number lies between the places of the neighbors
        _spread(session, job)
        found = _between(session, job, target)
    assert found is not None, "spread places have gaps between them"
    return found


def _between(session: Session, job: Job, target: MoveTarget) -> float | None:
    """Return a free place at the target, or None if there is no gap."""
    others = (*_others(job), Job.id != job.id)
    if target.to is not None or (neighbor_id := target.before or target.after) is None:
        outermost = func.min(Job.place) if target.to == "first" else func.max(Job.place)
        edge = session.scalar(select(outermost).where(*others))
        return job.place if edge is None else edge - 1 if target.to == "first" else max(edge, job.created_at) + 1
    neighbor_place = session.scalar(select(Job.place).where(Job.id == neighbor_id)) or 0.0
    same = session.scalar(select(func.count()).where(*others, Job.place == neighbor_place)) or 0
    is_next = Job.place < neighbor_place if target.before else Job.place > neighbor_place
    edge = func.max(Job.place) if target.before else func.min(Job.place)
    neighbor = session.scalar(select(edge).where(*others, is_next))
    if neighbor is None:
        neighbor = neighbor_place - 2 if target.before else neighbor_place + 2
    place = (neighbor_place + neighbor) / 2
    return place if same == 1 and place not in (neighbor_place, neighbor) else None


def _spread(session: Session, job: Job) -> None:
    """Renumber the places of all waiting jobs with gaps between them, and keep their order."""
    waiting = list(session.scalars(select(Job).where(*_others(job)).order_by(Job.id).with_for_update()))
    waiting.sort(key=lambda each: (each.place, each.id))
    first = waiting[0].place
    for number, each in enumerate(waiting):
        each.place = first + number
    session.flush()


def _others(job: Job) -> tuple[ColumnElement[bool], ...]:
    return (Job.state.in_(WAITING), Job.project_id == job.project_id, Job.priority == job.priority)


def _check_waits(job: Job, done: Literal["held", "released", "moved"]) -> None:
    if job.state in WAITING:
        return
    name = f"running_job_not_{done}"
    if job.state in FINAL_STATES:
        name = "finished_job_not_waiting"
    elif job.state == JobState.PAUSED:
        name = f"paused_job_not_{done}"
    raise Conflict(name, job=job.id, current=_current(job), done=done)


def _check_alike(job: Job, other: Job, *, param: str) -> None:
    if other.state in WAITING and other.priority == job.priority:
        return
    current, priority, own = _current(other), PriorityClass(other.priority).name, PriorityClass(job.priority).name
    if other.state in WAITING:
        raise Conflict("other_priority_in_queue", other=other.id, priority=priority, job=job.id, own=own, param=param)
    raise Conflict("other_job_not_in_queue", other=other.id, current=current, own=own, job=job.id, param=param)


def _current(job: Job) -> str:
    verbs = {JobState.SUCCEEDED: "has", JobState.FAILED: "has", JobState.CANCELLED: "was"}
    return f"{verbs.get(JobState(job.state), 'is')} {job.state}"


def _field(target: MoveTarget) -> Literal["before", "after"]:
    return "before" if target.before is not None else "after"


def _move_message(target: MoveTarget) -> str:
    if target.to is not None:
        return f"The job was moved to the {target.to} position among its project's jobs of the same priority."
    return f"The job was moved directly {'before' if target.before else 'after'} {target.before or target.after}."


def _due(job: Job) -> float:
    return (job.needed_start or job.deadline or 0.0) - BEFORE_ALL


def _expected_seconds(session: Session, job: Job) -> float:
    """Return the estimated duration of the training in seconds.

    Uses the job's own estimate from its last attempt. Else uses the median step time of the project's latest jobs on
    the same base model, or 0 if there is none.
    """
    remaining = (job.progress or {}).get("seconds_left")
    if isinstance(remaining, int | float):
        return float(remaining)
    columns = (Job.base_model, Job.num_steps, Job.started_at, Job.finished_at, Job.state)
    latest = select(*columns).where(Job.project_id == job.project_id).order_by(Job.created_at.desc(), Job.id.desc())
    step_seconds = [
        (row.finished_at - row.started_at) / row.num_steps
        for row in session.execute(latest.limit(LATEST_JOBS))
        if row.state == JobState.SUCCEEDED and row.base_model == job.base_model and row.num_steps and row.started_at
    ]
    return (job.num_steps or 0) * median(step_seconds) if step_seconds else 0.0
