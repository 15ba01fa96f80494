"""A person's verbs on a sweep: cancel it, close it, stop one of its trials."""

from __future__ import annotations

from sqlalchemy.orm import Session

from catalog.audit import log
from catalog.audit.log import AuditType
from catalog.db.database import Database, read_clock
from catalog.errors import Conflict
from catalog.history import queries
from catalog.jobs import commands
from catalog.search.trials import find_sweep, find_trial
from catalog.tables.jobs import Job
from catalog.tables.sweeps import Sweep, Trial

BY_CLIENT = "Its client has stopped it"


def cancel(db: Database, *, project_id: str, sweep_id: str, is_client_retry: bool = False) -> Sweep:
    """No further trial is made, and the controller cancels those that have not ended; what is trained stays.

    is_client_retry: as of jobs.cancel. Then a sweep that is cancelled is its answer.
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
    """Of an unfinished sweep that is locked. Canceling twice is canceling once."""
    if not sweep.cancel_requested:
        sweep.cancel_requested = sweep.is_closed = True
        sweep.due_at = _noted(session, "sweep.cancelled", sweep)


def close(db: Database, *, project_id: str, sweep_id: str) -> Sweep:
    """No further trial is made; those that there are go on to their end. Closing twice is closing once."""
    with db.write() as session:
        sweep = find_sweep(session, project_id, sweep_id, locked=True)
        if sweep.finished_at is None and not sweep.is_closed:
            sweep.is_closed, sweep.due_at = True, _noted(session, "sweep.closed", sweep)
        return sweep


def stop_trial(
    db: Database, *, project_id: str, sweep_id: str, number: int, is_client_retry: bool = False
) -> tuple[Trial, Job]:
    """End a trial before its last step, for it does badly: at once where no worker trains it.

    It leaves no adapter. Raises Conflict where it has ended. is_client_retry: then one that was stopped is its answer.
    """
    with db.write() as session:
        sweep = find_sweep(session, project_id, sweep_id)
        trial = find_trial(session, sweep, number)
        job = queries.find(session, project_id, trial.job_id, locked=True)
        session.refresh(trial)
        if not (is_client_retry and trial.stopped is not None):
            _stop(session, trial, job)
        return trial, job


def _stop(session: Session, trial: Trial, job: Job) -> None:
    """One whose job is being cancelled ends as that."""
    is_cancelled = job.cancel_requested
    commands.stop(session, job, commands.PRUNE, now=read_clock(session))
    if trial.stopped is None and not is_cancelled:
        trial.stopped = BY_CLIENT


def _noted(session: Session, type: AuditType, sweep: Sweep) -> float:  # noqa: A002
    """In the audit log; returns when."""
    now = read_clock(session)
    log.note(session, type, now=now, object_id=sweep.id, project_id=sweep.project_id)
    return now


def _already_final(sweep: Sweep) -> Conflict:
    return Conflict(
        f"The sweep {sweep.id} has ended: {sweep.state}.",
        code="sweep_already_final",
        remedy="A finished sweep does not change any more. Make a new one to search again.",
    )
