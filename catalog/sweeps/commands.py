"""Runs users' commands on a sweep: cancel it, close it, or stop one of its trials."""

from __future__ import annotations

from sqlalchemy.orm import Session

from catalog.audit import log
from catalog.audit.log import AuditType
from catalog.db.database import Database, read_clock
from catalog.errors import Conflict
from catalog.history import queries
from catalog.jobs import commands
from catalog.sweeps.queries import find_sweep, find_trial
from catalog.tables.jobs import Job
from catalog.tables.sweeps import Sweep, Trial

BY_CLIENT = "Stopped by the client"


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
