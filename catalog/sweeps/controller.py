"""The controller of sweeps: creates the next trials, cancels all trials, and records the best one.

`advance` takes one step for one sweep, in one short transaction. Every API server calls it periodically, so if one is
killed, another continues. Workers don't call it, because they may not create jobs. Jobs are locked before the sweep,
never after. Before each round of trials, the validity module checks the key and project of the sweep.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.orm import Session

from catalog.admission.accept import resolve_targets
from catalog.admission.target_layers import Targets, TargetsOutdated
from catalog.caller import Caller
from catalog.db.database import Database, read_clock, serialize
from catalog.errors import LorryError, QuotaExceeded
from catalog.fleet import views
from catalog.jobs import commands
from catalog.search.trials import design_of, find_sweep
from catalog.states import UNFINISHED_STATES, JobState
from catalog.sweeps import validity
from catalog.sweeps.creation import AT_ONCE, Draft, Drafts, draft_of, make_trial
from catalog.tables.jobs import Job
from catalog.tables.storage import Adapter, Artifact
from catalog.tables.sweeps import Sweep, Trial
from catalog.usage import ledger

CANCELLED_AT_ONCE = 100
OUTDATED_SECONDS = 1.0
"""How long until a sweep repeats a step during which its base model changed."""
HELD_SECONDS = 60.0
"""How long until a sweep retries to create trials after its project has reached a quota."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Round:
    """The next trials of a sweep, drafted before the transaction that creates them."""

    drafts: Drafts
    error: LorryError | None = None
    """Why no more trials than the drafts are possible."""


def advance(db: Database, sweep_id: str | None = None) -> bool:
    """Take one step for the given sweep, or for the one that has been due longest. Returns False if none is due."""
    with db.read() as session:
        due = select(Sweep).where(Sweep.due_at <= read_clock(session))
        due = due if sweep_id is None else due.where(Sweep.id == sweep_id)
        found = session.scalar(due.order_by(Sweep.due_at).limit(1))
    if found is None:
        return False
    next_round = _draft(db, found)
    with db.write() as session:
        serialize(session, f"advance {found.id}")
        if _cancel_some(session, found.id):
            return True
        sweep = find_sweep(session, found.project_id, found.id, locked=True)
        _continue(session, sweep, next_round, now=read_clock(session))
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


def _draft(db: Database, sweep: Sweep) -> _Round:
    """Return drafts of as many trials as one transaction creates; none if the sweep creates no more."""
    drafts, error = list[Draft](), None
    targets = Targets()
    if _makes_trials(sweep):
        number = min(AT_ONCE, sweep.requested.get("max_concurrent") or AT_ONCE, sweep.num_trials - sweep.num_created)
        try:
            design = design_of(sweep)
            for each in range(sweep.num_created, sweep.num_created + number):
                drafts.append(draft_of(design, design.parameters_of(each)))
        except LorryError as raised:
            error = raised
        targets = resolve_targets(db, _caller(sweep), [draft.request for draft in drafts])
    return _Round(drafts=Drafts(first=sweep.num_created, trials=drafts, targets=targets), error=error)


def _makes_trials(sweep: Sweep) -> bool:
    """Return whether the controller still has to create trials of the sweep. Clients create those of ask_tell."""
    is_open = not (sweep.is_closed or sweep.cancel_requested or sweep.finished_at is not None)
    return is_open and sweep.num_created < sweep.num_trials and sweep.requested["search"]["type"] != "ask_tell"


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


def _cancel_some(session: Session, sweep_id: str) -> bool:
    """Cancel some trials of a sweep whose cancellation is requested. Returns False if none is left to cancel."""
    if not session.scalar(select(Sweep.cancel_requested).where(Sweep.id == sweep_id)):
        return False
    some = select(Job).where(*_to_cancel(sweep_id)).order_by(Job.id).limit(CANCELLED_AT_ONCE).with_for_update(of=Job)
    jobs, now = list(session.scalars(some)), read_clock(session)
    for job in jobs:
        commands.stop(session, job, commands.CANCEL, now=now)
    return bool(jobs)


def _to_cancel(sweep_id: str) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions for the unfinished trials whose cancellation has not been requested."""
    return Job.sweep_id == sweep_id, Job.state.in_(UNFINISHED_STATES), Job.cancel_requested.is_(False)


def _continue(session: Session, sweep: Sweep, next_round: _Round, *, now: float) -> None:
    if sweep.due_at is None:
        return
    if sweep.cancel_requested and session.scalar(select(Job.id).where(*_to_cancel(sweep.id)).limit(1)) is not None:
        return  # a user has cancelled the sweep since `_cancel_some`, and the next step cancels its trials
    sweep.due_at = None
    unfinished = _count_unfinished(session, sweep)
    if sweep.num_created < sweep.num_trials and not (sweep.is_closed or sweep.cancel_requested):
        if not _makes_trials(sweep):
            return
        limit = sweep.requested.get("max_concurrent") or sweep.num_trials
        max_trials = min(AT_ONCE, limit - unfinished)
        if max_trials > 0:
            sweep.due_at = _make(session, sweep, next_round, max_trials, now=now)
    elif not unfinished:
        _finish(session, sweep, now=now)


def _make(session: Session, sweep: Sweep, next_round: _Round, max_trials: int, *, now: float) -> float | None:
    """Create up to `max_trials` trials. Returns when the sweep needs its next step; None: once a trial has finished.

    If no more trials are possible, for example because the base model was deleted, the sweep is closed and records
    the error, and existing trials continue. If the project has reached a quota, the sweep retries later.
    """
    error = validity.why_ended(session, sweep, now=now)
    if error is not None:
        validity.close(session, sweep, error, now=now)
        return now
    try:
        num_made = _make_drafted(session, sweep, next_round, max_trials, now=now)
    except TargetsOutdated:
        session.refresh(sweep, with_for_update=True)
        return now + OUTDATED_SECONDS
    except QuotaExceeded:
        session.refresh(sweep, with_for_update=True)
        return now + HELD_SECONDS
    except LorryError as error:
        session.refresh(sweep, with_for_update=True)
        sweep.is_closed = True
        sweep.error = error.as_job_error()
        return now
    if sweep.num_created == sweep.num_trials:
        return None
    is_limited = num_made == max_trials < AT_ONCE  # max_concurrent is the limit
    return None if is_limited else now


def _make_drafted(session: Session, sweep: Sweep, next_round: _Round, max_trials: int, *, now: float) -> int:
    """Create up to `max_trials` of the drafted trials that no other process has created. Returns how many."""
    defaults = views.fleet_defaults(session, now=now)
    for num_made in range(min(max_trials, sweep.num_trials - sweep.num_created)):
        draft = next_round.drafts.of(sweep.num_created)
        if draft is None:
            if next_round.error is not None:
                raise next_round.error
            return num_made
        with ledger.savepoint(session):
            targets = next_round.drafts.targets
            make_trial(session, _caller(sweep), sweep, draft, targets, now=now, fleet_defaults=defaults)
    return max_trials


def _finish(session: Session, sweep: Sweep, *, now: float) -> None:
    """Finish the sweep, all trials of which are final, and record the best one."""
    best = best_trial(session, sweep.id)
    sweep.state = "cancelled" if sweep.cancel_requested else "succeeded" if best is not None else "failed"
    sweep.finished_at, sweep.best_job, sweep.is_closed = now, best and best.job_id, True
    if best is not None and sweep.requested.get("keep_adapters") == "best":
        _delete_others(session, sweep, best, now=now)


def best_trial(session: Session, sweep_id: str) -> Trial | None:
    """Return the best of the succeeded trials, of equal ones the earliest."""
    done = select(Trial).join(Job, Job.id == Trial.job_id)
    done = done.where(Trial.sweep_id == sweep_id, Job.state == JobState.SUCCEEDED)
    return session.scalar(done.order_by(Trial.score, Trial.number).limit(1))


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


def _count_unfinished(session: Session, sweep: Sweep) -> int:
    unfinished = (Job.sweep_id == sweep.id, Job.state.in_(UNFINISHED_STATES))
    return session.scalar(select(func.count()).where(*unfinished)) or 0
