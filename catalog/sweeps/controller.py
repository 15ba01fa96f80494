"""The controller of sweeps: prunes trials, creates the next ones, cancels all trials, and records the best one.

`advance` takes one step for one sweep, in one short transaction. Every API server calls it periodically, so if one is
killed, another continues. Workers don't call it, because they may not create jobs. Jobs are locked before the sweep,
never after. The controller acts for the creator of a sweep long after the request. So before each round of trials, it
checks that the creator's key is valid and the project not archived.
"""

from __future__ import annotations

import time

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.orm import Session

from catalog.admission.target_layers import Targets, TargetsOutdated
from catalog.audit import log
from catalog.caller import Caller
from catalog.db.database import Database, get_once, read_clock, serialize
from catalog.error_texts import ErrorText
from catalog.errors import LorryError, QuotaExceeded
from catalog.history import events
from catalog.jobs import commands
from catalog.states import FINAL_STATES, UNFINISHED_STATES, JobState
from catalog.sweeps.creation import AT_ONCE, Drafts, design_of, draft, make_trials
from catalog.sweeps.queries import best_trial, find_sweep, stop
from catalog.sweeps.study import PastTrial, judge
from catalog.tables.jobs import Job, Sweep, Trial
from catalog.tables.storage import Adapter, Artifact
from catalog.tables.table import Json
from catalog.tables.tenancy import ApiKey, Project
from catalog.tenancy.authentication import is_live
from catalog.usage import ledger

CANCELLED_AT_ONCE = 100
OUTDATED_SECONDS = 1.0
"""How long until a sweep repeats a step during which its base model changed."""
HELD_SECONDS = 60.0
"""How long until a sweep retries to create trials after its project has reached a quota."""


def advance(db: Database, sweep_id: str | None = None) -> bool:
    """Take one step for the given sweep, or for the one that has been due longest. Returns False if none is due."""
    with db.read() as session:
        due = select(Sweep).where(Sweep.due_at <= read_clock(session))
        due = due if sweep_id is None else due.where(Sweep.id == sweep_id)
        found = session.scalar(due.order_by(Sweep.due_at).limit(1))
        past = [] if found is None or found.requested["search"]["type"] != "tpe" else _past(session, found)
    if found is None:
        return False
    drafts = _draft(db, found, past)
    with db.write() as session:
        serialize(session, f"advance {found.id}")
        now = read_clock(session)
        if _cancel_some(session, found.id, now=now):
            return True
        _prune(session, found, now=now)
        sweep = find_sweep(session, found.project_id, found.id, locked=True)
        _continue(session, sweep, drafts, now=now)
        return True


def advance_some(db: Database, *, most: int) -> int:
    """Take up to `most` steps. Returns how many were taken. Each is followed by a pause of the same length, so that
    other processes can write for half of the time."""
    for number in range(most):
        began = time.monotonic()
        if not advance(db):
            return number
        time.sleep(time.monotonic() - began)
    return most


def _past(session: Session, sweep: Sweep) -> list[PastTrial]:
    rows = select(Trial, Job.state).join(Job, Job.id == Trial.job_id).where(Trial.sweep_id == sweep.id)
    found = session.execute(rows.order_by(Trial.number)).all()
    return [PastTrial(trial=trial, state=JobState(state)) for trial, state in found[: sweep.num_created]]


def _draft(db: Database, sweep: Sweep, past: list[PastTrial]) -> Drafts:
    """Return drafts of as many trials as one transaction creates; none if the sweep creates no more."""
    first, error = sweep.num_created, None
    if _makes_trials(sweep):
        try:
            number = min(AT_ONCE, sweep.max_concurrent or AT_ONCE)
            return draft(db, _caller(sweep), design_of(sweep), first=first, number=number, past=past)
        except LorryError as raised:
            error = raised
    return Drafts(first=first, trials=(), targets=Targets(), error=error)


def _makes_trials(sweep: Sweep) -> bool:
    """Return whether the controller still has to create trials of the sweep."""
    is_open = not (sweep.is_closed or sweep.cancel_requested or sweep.finished_at is not None)
    return is_open and sweep.num_created < sweep.num_trials


def _caller(sweep: Sweep) -> Caller:
    """Return the creator of the sweep. The trials were counted against this key's daily limit on acceptance."""
    return Caller(
        api_key_id=sweep.created_by,
        project_id=sweep.project_id,
        project_name="",
        organization_id="",
        organization_name="",
        is_operator=False,
        name="",
    )


def _cancel_some(session: Session, sweep_id: str, *, now: float) -> bool:
    """Cancel some trials of a sweep whose cancellation is requested. Returns False if none is left to cancel."""
    if not session.scalar(select(Sweep.cancel_requested).where(Sweep.id == sweep_id)):
        return False
    some = select(Job).where(*_to_cancel(sweep_id)).order_by(Job.id).limit(CANCELLED_AT_ONCE).with_for_update(of=Job)
    jobs = list(session.scalars(some))
    for job in jobs:
        commands.stop(session, job, commands.CANCEL, now=now)
    return bool(jobs)


def _to_cancel(sweep_id: str) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions for the unfinished trials whose cancellation has not been requested."""
    return Job.sweep_id == sweep_id, Job.state.in_(UNFINISHED_STATES), Job.cancel_requested.is_(False)


def _prune(session: Session, sweep: Sweep, *, now: float) -> None:
    """Judge the trials that have reached a rung, and stop those that are not good enough. Locks their jobs."""
    reached = select(Trial.job_id).where(*_to_judge(sweep.id))
    waiting = select(Job).where(Job.id.in_(reached)).order_by(Job.id).with_for_update(of=Job)
    jobs = {job.id: job for job in session.scalars(waiting)}
    if not jobs or sweep.rungs is None:
        return
    rows = select(Trial).where(Trial.sweep_id == sweep.id).order_by(Trial.number)
    trials = [row for row in session.scalars(rows) if row.job_id in jobs or row.pruner_state]
    for job_id, must_stop in judge(sweep.rungs, trials, jobs).items():
        trial, job = session.get_one(Trial, job_id), jobs[job_id]
        step, trial.reached_step, trial.reached_score = trial.reached_step, None, None
        if must_stop and job.state not in FINAL_STATES and not job.cancel_requested:
            why = (
                f"At rung {trial.rung}, step {step}, it was not among the best 1/{sweep.rungs['reduction_factor']} of "
            )
            why += "the trials that have reached it"
            stop(session, trial, job, why, now=now)
            events.add(session, job_id, now=now, message=f"{why}.", data={"step": step})


def _to_judge(sweep_id: str) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions for the trials that have reached a rung where they have not been judged."""
    return Trial.sweep_id == sweep_id, Trial.reached_step.is_not(None)


def _continue(session: Session, sweep: Sweep, drafts: Drafts, *, now: float) -> None:
    if sweep.due_at is None:
        return
    if sweep.cancel_requested and session.scalar(select(Job.id).where(*_to_cancel(sweep.id)).limit(1)) is not None:
        return  # a user has cancelled the sweep since `_cancel_some`, and the next step cancels its trials
    if session.scalar(select(Trial.job_id).where(*_to_judge(sweep.id)).limit(1)) is not None:
        return  # a trial has reached a rung since `_prune`, and the next step judges it
    sweep.due_at = None
    unfinished = select(func.count()).where(Job.sweep_id == sweep.id, Job.state.in_(UNFINISHED_STATES))
    num_unfinished = session.scalar(unfinished) or 0
    if _makes_trials(sweep):
        limit = min(AT_ONCE, (sweep.max_concurrent or sweep.num_trials) - num_unfinished)
        if limit > 0:
            sweep.due_at = _make(session, sweep, drafts, limit, now=now)
    elif not num_unfinished:
        _finish(session, sweep, now=now)


def _make(session: Session, sweep: Sweep, drafts: Drafts, limit: int, *, now: float) -> float | None:
    """Create up to `limit` trials. Returns when the sweep needs its next step; None: once a trial has finished.

    If no more trials are possible, for example because the base model was deleted, the sweep is closed and records
    the error, and existing trials continue. If the project has reached a quota, the sweep retries later.
    """
    error = why_ended(session, sweep, now=now)
    if error is not None:
        close_with_error(session, sweep, error, now=now)
        return now
    try:
        num_made = make_trials(session, _caller(sweep), sweep, drafts, limit=limit, now=now)
    except LorryError as error:
        session.refresh(sweep, with_for_update=True)
        if isinstance(error, TargetsOutdated):
            return now + OUTDATED_SECONDS
        if isinstance(error, QuotaExceeded):
            return now + HELD_SECONDS
        sweep.is_closed, sweep.error = True, error.as_job_error()
        return now
    is_limited = num_made == limit < AT_ONCE  # max_concurrent is the limit
    return None if is_limited or sweep.num_created == sweep.num_trials else now


def _finish(session: Session, sweep: Sweep, *, now: float) -> None:
    """Finish the sweep, all trials of which are final, and record the best one."""
    best = best_trial(session, sweep.id)
    sweep.state = "cancelled" if sweep.cancel_requested else "succeeded" if best is not None else "failed"
    sweep.finished_at, sweep.best_job, sweep.is_closed = now, best and best.job_id, True
    if best is not None and sweep.requested.get("keep_adapters") == "best":
        _delete_others(session, sweep, best, now=now)


def _delete_others(session: Session, sweep: Sweep, best: Trial, *, now: float) -> None:
    """Delete the adapters of the other trials, except those that an unfinished job continues."""
    others = select(Adapter.id).join(Trial, Trial.job_id == Adapter.job_id)
    others = others.where(Trial.sweep_id == sweep.id, Trial.job_id != best.job_id, Adapter.deleted_at.is_(None))
    locked = list(session.scalars(others.order_by(Adapter.id).with_for_update(of=Adapter)))
    continued = select(Job.parent_adapter).where(Job.parent_adapter.in_(locked), Job.state.in_(UNFINISHED_STATES))
    gone = set(locked) - set(session.scalars(continued))
    kept = select(func.coalesce(func.sum(Artifact.num_bytes), 0)).select_from(Adapter)
    kept = kept.join(Artifact, Artifact.digest == Adapter.artifact).where(Adapter.id.in_(gone))
    ledger.store(session, sweep.project_id, -(session.scalar(kept) or 0), now=now)
    session.execute(update(Adapter).where(Adapter.id.in_(gone)).values(deleted_at=now))


def why_ended(session: Session, sweep: Sweep, *, now: float) -> Json | None:
    """Return the error with which the sweep must be closed, or None if it may create trials.

    A concurrent revocation waits until the transaction has ended.
    """
    project = session.get_one(Project, sweep.project_id)
    if project.archived_at is not None:
        return ErrorText.of("project_of_sweep_archived", project=project.name).as_job_error()
    key = _valid_or_last(session, sweep.created_by, now=now)
    if key is not None and is_live(key, now):
        return None
    if key is not None and key.revoked_at is None:
        return ErrorText.of("api_key_expired", key=key.id).as_job_error()
    return ErrorText.of("api_key_revoked", key=key.id if key else sweep.created_by).as_job_error()


def close_with_error(session: Session, sweep: Sweep, error: Json, *, now: float) -> None:
    """Close the sweep with this error. The audit event names the server as the actor, and the error's code."""
    sweep.is_closed, sweep.error = True, error
    details: Json = {"reason": error["code"]}
    log.note(
        session,
        "sweep.closed",
        now=now,
        object_id=sweep.id,
        project_id=sweep.project_id,
        details=details,
        actor=log.SERVER,
    )


def _valid_or_last(session: Session, key_id: str, *, now: float) -> ApiKey | None:
    """Return the key, or the key that replaced it if a rotation has ended it, because rotation keeps sweeps running.

    A revoked key has no successor here, even if it was rotated.
    """
    key = get_once(session, ApiKey, key_id, lock="share")
    while key is not None and key.revoked_at is None and not is_live(key, now) and key.replaced_by is not None:
        key = get_once(session, ApiKey, key.replaced_by, lock="share")
    return key
