"""What becomes of a sweep between its trials: the next ones are made, all are cancelled, the best is promoted.

`advance` takes one step for one sweep, in one short transaction; workers and apis call it now and then, any of them,
and whatever is killed, another goes on. Jobs are locked before the sweep, never after.
"""

from __future__ import annotations

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from catalog import daily, jobs
from catalog.callers import Caller
from catalog.db import Database, read_clock, serialise
from catalog.errors import LorryError, QuotaExceeded
from catalog.states import UNFINISHED_STATES, JobState
from catalog.sweeps.creation import AT_ONCE, make_trials
from catalog.sweeps.designs import design_of
from catalog.sweeps.finding import find_sweep
from catalog.tables import Adapter, Artifact, Job, Sweep, Trial

CANCELLED_AT_ONCE = 100
HELD_SECONDS = 60.0
"""After so long a sweep whose project has reached a limit tries again to make its next trials."""


def advance(db: Database, sweep_id: str | None = None) -> bool:
    """One step for the sweep that has waited longest for one, or for this one. False where there is nothing to do."""
    with db.read() as session:
        due = select(Sweep.id, Sweep.project_id).where(Sweep.due_at <= read_clock(session))
        due = due if sweep_id is None else due.where(Sweep.id == sweep_id)
        found = session.execute(due.order_by(Sweep.due_at).limit(1)).first()
    if found is None:
        return False
    with db.write() as session:
        serialise(session, f"advance {found.id}")
        if _cancel_some(session, found.id):
            return True
        sweep = find_sweep(session, found.project_id, found.id, locked=True)
        _go_on(session, sweep, now=read_clock(session))
        return True


def _cancel_some(session: Session, sweep_id: str) -> bool:
    """Of a sweep that is to be cancelled, some of the trials that have not been told. False where all have."""
    if not session.scalar(select(Sweep.cancel_requested).where(Sweep.id == sweep_id)):
        return False
    untold = (Job.sweep_id == sweep_id, Job.state.in_(UNFINISHED_STATES), Job.cancel_requested.is_(False))
    some = select(Job).where(*untold).order_by(Job.id).limit(CANCELLED_AT_ONCE).with_for_update(of=Job)
    told = list(session.scalars(some))
    for job in told:
        jobs.stop(session, job, jobs.CANCEL)
    return bool(told)


def _go_on(session: Session, sweep: Sweep, *, now: float) -> None:
    if sweep.due_at is None:
        return
    sweep.due_at = None
    unfinished = _count_unfinished(session, sweep)
    if not (sweep.is_closed or sweep.cancel_requested) and sweep.num_created < sweep.num_trials:
        if sweep.requested["search"]["type"] == "ask_tell":
            return
        limit = sweep.requested.get("max_concurrent") or sweep.num_trials
        room = min(AT_ONCE, limit - unfinished)
        if room > 0:
            if not _make(session, sweep, room, now=now):
                sweep.due_at = now + HELD_SECONDS
                return
            may_go_on = sweep.num_created < sweep.num_trials and room == AT_ONCE
            sweep.due_at = now if may_go_on or sweep.is_closed else None
    elif not unfinished:
        _finish(session, sweep, now=now)


def _make(session: Session, sweep: Sweep, number: int, *, now: float) -> bool:
    """Where no more can be made, as when the base was deleted, those that there are go on, and the sweep tells why.

    False where the project has reached a limit: then it is tried again later.
    """
    caller = Caller(
        api_key_id=sweep.created_by,
        project_id=sweep.project_id,
        project_name="",
        organization_id="",
        organization_name="",
        is_operator=False,
        name="",
    )
    try:
        design = design_of(sweep)
        for _ in range(number):
            with daily.savepoint(session):
                make_trials(session, caller, sweep, design, at_most=1, now=now)
    except QuotaExceeded:
        session.refresh(sweep, with_for_update=True)
        return False
    except LorryError as error:
        session.refresh(sweep, with_for_update=True)
        sweep.is_closed = True
        sweep.error = {"code": error.code, "message": error.sentence(), "param": error.param}
    return True


def _finish(session: Session, sweep: Sweep, *, now: float) -> None:
    """All trials are final: the best is promoted."""
    best = best_trial(session, sweep.id)
    sweep.state = "cancelled" if sweep.cancel_requested else "succeeded" if best is not None else "failed"
    sweep.finished_at, sweep.best_job, sweep.is_closed = now, best and best.job_id, True
    if best is not None and sweep.requested.get("keep_adapters") == "best":
        _delete_others(session, sweep, best, now=now)


def best_trial(session: Session, sweep_id: str) -> Trial | None:
    """The best of those that have succeeded; of equals, the earlier."""
    done = select(Trial).join(Job, Job.id == Trial.job_id)
    done = done.where(Trial.sweep_id == sweep_id, Job.state == JobState.SUCCEEDED)
    return session.scalar(done.order_by(Trial.score, Trial.number).limit(1))


def _delete_others(session: Session, sweep: Sweep, best: Trial, *, now: float) -> None:
    """But those that a job continues which has not ended."""
    others = select(Adapter.id).join(Trial, Trial.job_id == Adapter.job_id)
    others = others.where(Trial.sweep_id == sweep.id, Trial.job_id != best.job_id, Adapter.deleted_at.is_(None))
    locked = list(session.scalars(others.order_by(Adapter.id).with_for_update(of=Adapter)))
    continued = select(Job.parent_adapter).where(Job.parent_adapter.in_(locked), Job.state.in_(UNFINISHED_STATES))
    gone = set(locked) - set(session.scalars(continued))
    held = select(func.coalesce(func.sum(Artifact.num_bytes), 0)).select_from(Adapter)
    held = held.join(Artifact, Artifact.digest == Adapter.artifact).where(Adapter.id.in_(gone))
    daily.store(session, sweep.project_id, -(session.scalar(held) or 0), now=now)
    session.execute(update(Adapter).where(Adapter.id.in_(gone)).values(deleted_at=now))


def _count_unfinished(session: Session, sweep: Sweep) -> int:
    unfinished = (Job.sweep_id == sweep.id, Job.state.in_(UNFINISHED_STATES))
    return session.scalar(select(func.count()).where(*unfinished)) or 0
