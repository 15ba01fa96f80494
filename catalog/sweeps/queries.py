"""Reads sweeps (counts by state, the best trial so far, the leaderboard), and runs users' commands on them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, func, literal, select, tuple_
from sqlalchemy.orm import Session

from catalog.audit import log
from catalog.audit.log import AuditType
from catalog.db.database import Database, read_clock
from catalog.db.pagination import Page, paginate, unknown_cursor
from catalog.errors import Conflict, NotFound
from catalog.history import queries
from catalog.jobs import commands
from catalog.lifecycle.trials import measure_of
from catalog.states import JobState
from catalog.tables.jobs import Job, Sweep, Trial
from catalog.tables.storage import Adapter

BY_CLIENT = "Stopped by the client"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialView:
    """A trial with its job. value: the objective; None before it is measured."""

    trial: Trial
    job: Job
    value: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepView:
    """A sweep with its current results."""

    sweep: Sweep
    counts: dict[str, int]
    """Number of trials by state."""
    best: TrialView | None
    """The best of the trials that have succeeded so far."""
    best_adapter: str | None
    """The id of the best trial's adapter, unless it is deleted."""


def get(db: Database, *, project_id: str, sweep_id: str) -> SweepView:
    """Return the sweep. Raises NotFound."""
    with db.snapshot() as session:
        return _views(session, [find_sweep(session, project_id, sweep_id)])[0]


def list_page(db: Database, *, project_id: str, after: str | None = None, limit: int = 20) -> Page[SweepView]:
    """Return a page of the project's sweeps, newest first."""
    scope = select(Sweep).where(Sweep.project_id == project_id)
    with db.snapshot() as session:
        page = paginate(session, scope, created=Sweep.created_at, ident=Sweep.id, after=after, limit=limit)
        return Page(items=_views(session, page.items), has_more=page.has_more)


def leaderboard(
    db: Database, *, project_id: str, sweep_id: str, after: str | None = None, limit: int = 20
) -> Page[TrialView]:
    """Return a page of trials, the best first, those without a value last. after: the id of a trial's job.

    Values of running trials change, and with them the position of `after`.
    """
    with db.read() as session:
        sweep = find_sweep(session, project_id, sweep_id)
        scope = select(Trial, Job).join(Job, Job.id == Trial.job_id).where(Trial.sweep_id == sweep.id)
        if after is not None:
            scope = scope.where(_beyond(session, sweep, after))
        rows = session.execute(scope.order_by(Trial.score, Trial.number).limit(limit + 1)).all()
        views = [_trial_view(sweep, trial, job) for trial, job in rows]
        return Page(items=views[:limit], has_more=len(views) > limit)


def trial(db: Database, *, project_id: str, sweep_id: str, number: int) -> TrialView:
    """Return the trial with this number. Raises NotFound."""
    with db.read() as session:
        sweep = find_sweep(session, project_id, sweep_id)
        found = find_trial(session, sweep, number)
        return _trial_view(sweep, found, session.get_one(Job, found.job_id))


def trials_by_job(db: Database, job_ids: Collection[str]) -> dict[str, Trial]:
    """Return the trials of these jobs by job id, without jobs that are not trials."""
    if not job_ids:
        return {}
    with db.read() as session:
        return {row.job_id: row for row in session.scalars(select(Trial).where(Trial.job_id.in_(job_ids)))}


def find_sweep(session: Session, project_id: str, sweep_id: str, *, locked: bool = False) -> Sweep:
    """Return a sweep of the project. Raises NotFound.

    `locked`: no other transaction can create a trial meanwhile. Lock jobs before the sweep, never after it.
    """
    own = select(Sweep).where(Sweep.id == sweep_id, Sweep.project_id == project_id)
    sweep = session.scalar(own.with_for_update(of=Sweep) if locked else own)
    if sweep is None:
        raise NotFound("sweep_not_found", sweep_id=sweep_id)
    return sweep


def find_trial(session: Session, sweep: Sweep, number: int) -> Trial:
    """Return the trial with this number. Raises NotFound."""
    found = session.scalar(select(Trial).where(Trial.sweep_id == sweep.id, Trial.number == number))
    if found is not None:
        return found
    _path, is_coming = f"/v1/sweeps/{sweep.id}/trials", not sweep.is_closed and number < sweep.num_trials
    if is_coming:
        raise NotFound("trial_not_created", number=number, sweep=sweep.id)
    raise NotFound("trial_not_found", sweep=sweep.id, number=number, num_created=sweep.num_created - 1)


def best_trial(session: Session, sweep_id: str) -> Trial | None:
    """Return the best of the succeeded trials, of equal ones the earliest."""
    done = select(Trial).join(Job, Job.id == Trial.job_id)
    done = done.where(Trial.sweep_id == sweep_id, Job.state == JobState.SUCCEEDED)
    return session.scalar(done.order_by(Trial.score, Trial.number).limit(1))


def _beyond(session: Session, sweep: Sweep, after: str) -> ColumnElement[bool]:
    cursor = session.scalar(select(Trial).where(Trial.job_id == after, Trial.sweep_id == sweep.id))
    if cursor is None:
        raise unknown_cursor(after)
    place = tuple_(literal(cursor.score), literal(cursor.number))
    return tuple_(Trial.score, Trial.number) > place


def _views(session: Session, sweeps: Sequence[Sweep]) -> list[SweepView]:
    counted = select(Job.sweep_id, Job.state, func.count()).where(Job.sweep_id.in_([row.id for row in sweeps]))
    counts: dict[str, dict[str, int]] = {}
    for sweep_id, state, number in session.execute(counted.group_by(Job.sweep_id, Job.state)):
        counts.setdefault(sweep_id or "", {})[state] = number
    return [_sweep_view(session, sweep, counts.get(sweep.id, {})) for sweep in sweeps]


def _sweep_view(session: Session, sweep: Sweep, counts: dict[str, int]) -> SweepView:
    best = best_trial(session, sweep.id)
    if best is None:
        return SweepView(sweep=sweep, counts=counts, best=None, best_adapter=None)
    kept = select(Adapter.id).where(Adapter.job_id == best.job_id, Adapter.deleted_at.is_(None))
    view = _trial_view(sweep, best, session.get_one(Job, best.job_id))
    return SweepView(sweep=sweep, counts=counts, best=view, best_adapter=session.scalar(kept))


def _trial_view(sweep: Sweep, trial: Trial, job: Job) -> TrialView:
    is_measured = trial.score != float("inf")
    return TrialView(trial=trial, job=job, value=measure_of(sweep).direction * trial.score if is_measured else None)


def cancel(db: Database, *, project_id: str, sweep_id: str, is_client_retry: bool = False) -> Sweep:
    """Close the sweep and request its cancellation. The controller then cancels its unfinished trials.

    Adapters of finished trials stay. is_client_retry: the client repeats a request that had no reply; a cancelled sweep
    is then returned. Raises NotFound, and Conflict if the sweep has finished.
    """
    with db.write() as session:
        sweep = find_sweep(session, project_id, sweep_id, locked=True)
        if sweep.finished_at is not None:
            if is_client_retry and sweep.state == "cancelled":
                return sweep
            raise _already_final(sweep)
        request_cancel(session, sweep)
        return sweep


def request_cancel(session: Session, sweep: Sweep) -> None:
    """Request the cancellation of an unfinished sweep, which the caller has locked. Idempotent."""
    if not sweep.cancel_requested:
        sweep.cancel_requested = sweep.is_closed = True
        sweep.due_at = _noted(session, "sweep.cancelled", sweep)


def close(db: Database, *, project_id: str, sweep_id: str) -> Sweep:
    """Close the sweep: no more trials are created, and the existing ones continue. Idempotent."""
    with db.write() as session:
        sweep = find_sweep(session, project_id, sweep_id, locked=True)
        if sweep.finished_at is None and not sweep.is_closed:
            sweep.is_closed, sweep.due_at = True, _noted(session, "sweep.closed", sweep)
        return sweep


def stop_trial(db: Database, *, project_id: str, sweep_id: str, number: int, is_client_retry: bool = False) -> None:
    """Stop a trial before its last step, at once if no worker trains it. It creates no adapter.

    is_client_retry: the client repeats a request that had no reply; the trial may then be stopped already. Raises
    NotFound, and Conflict if the trial has finished.
    """
    with db.write() as session:
        sweep = find_sweep(session, project_id, sweep_id)
        trial = find_trial(session, sweep, number)
        job = queries.find(session, project_id, trial.job_id, locked=True)
        session.refresh(trial)
        if not (is_client_retry and trial.stopped is not None):
            stop(session, trial, job, BY_CLIENT, now=read_clock(session))


def stop(session: Session, trial: Trial, job: Job, why: str, *, now: float) -> None:
    """Stop the trial. If its job is being cancelled, the trial counts as cancelled, not as stopped."""
    is_cancelled = job.cancel_requested
    commands.stop(session, job, commands.PRUNE, now=now)
    if trial.stopped is None and not is_cancelled:
        trial.stopped = why


def _noted(session: Session, type: AuditType, sweep: Sweep) -> float:  # noqa: A002
    """Write the audit event. Returns its time."""
    now = read_clock(session)
    log.note(session, type, now=now, object_id=sweep.id, project_id=sweep.project_id)
    return now


def _already_final(sweep: Sweep) -> Conflict:
    return Conflict("sweep_already_final", sweep=sweep.id, state=sweep.state)
