"""Making sweeps and their trials: each trial is submitted as any job is. The same submission twice is one sweep.

The first trials are made in the transaction of the sweep itself; the controller makes the others, in numbers that
keep nobody else from writing for long.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from catalog import daily, quotas, submission
from catalog.audit import note
from catalog.callers import Caller
from catalog.db import Database, read_clock, serialise
from catalog.errors import Conflict
from catalog.spec import JobRequest
from catalog.submission import CLIENT_RETRY_SECONDS, check_idempotency_key, key_reused
from catalog.sweeps.design import Design, check_given, checked, designed, fewest_steps, rungs
from catalog.sweeps.designs import design_of
from catalog.sweeps.finding import find_sweep
from catalog.sweeps.spec import SweepRequest
from catalog.tables import File, Job, Sweep, Trial, new_id

AT_ONCE = 50
"""Trials that are made in one transaction."""


def create(
    db: Database,
    *,
    caller: Caller,
    request: SweepRequest,
    idempotency_key: str | None = None,
    body_digest: str,
    is_client_retry: bool = False,
) -> Sweep:
    """Accept a sweep with its first trials, or return the one that this same submission made before.

    The arguments are those of `submission.create`. Raises what that does, for any trial, and then there is nothing.
    """
    check_idempotency_key(idempotency_key)
    design = _whole_design(db, request)
    with db.write() as session:
        serialise(session, f"sweep of {caller.project_id} {idempotency_key or caller.api_key_id + body_digest}")
        now = read_clock(session)
        earlier = _same_submission(session, caller, idempotency_key, body_digest, is_client_retry, now=now)
        if earlier is not None:
            return earlier
        is_chosen_here = design.search != "ask_tell"
        if is_chosen_here:
            quotas.check_key(session, caller, num_jobs=design.num_trials, now=now)
        _try(session, caller, design.request_of(design.parameters_of(0) if is_chosen_here else {}), now=now)
        sweep = _row(caller, request, design, now=now)
        sweep.idempotency_key, sweep.body_digest = idempotency_key, body_digest
        session.add(sweep)
        session.flush()
        told = {"model": request.model, "search": design.search, "trials": design.num_trials}
        note(session, "sweep.created", now=now, object_id=sweep.id, project_id=sweep.project_id, details=told)
        if is_chosen_here:
            at_most = min(AT_ONCE, request.max_concurrent or AT_ONCE)
            make_trials(session, caller, sweep, design, at_most=at_most, now=now)
        sweep.due_at = now if is_chosen_here and sweep.num_created < sweep.num_trials else None
        return sweep


def made_before(
    db: Database, *, caller: Caller, idempotency_key: str | None, body_digest: str, is_client_retry: bool
) -> Sweep | None:
    """The sweep that `create` would return without making one. Raises Conflict for a key that had another body."""
    with db.read() as session:
        now = read_clock(session)
        return _same_submission(session, caller, idempotency_key, body_digest, is_client_retry, now=now)


def make_trials(
    session: Session, caller: Caller, sweep: Sweep, design: Design, *, at_most: int, now: float
) -> list[Trial]:
    """The next ones by number. The sweep is locked, or not seen by anybody yet."""
    last = min(sweep.num_trials, sweep.num_created + at_most)
    numbers = range(sweep.num_created, last)
    return [make_trial(session, caller, sweep, design, design.parameters_of(number), now=now) for number in numbers]


def make_trial(
    session: Session, caller: Caller, sweep: Sweep, design: Design, parameters: Mapping[str, Any], *, now: float
) -> Trial:
    """The next one, as a job of whoever made the sweep. Raises what submission does."""
    job = submission.submit(
        session,
        caller,
        design.request_of(parameters),
        body_digest=None,
        now=now,
        sweep_id=sweep.id,
        is_promised=design.search != "ask_tell",
    )
    trial = Trial(job_id=job.id, sweep_id=sweep.id, number=sweep.num_created, parameters=dict(parameters))
    trial.score, trial.step, trial.recent, trial.rung, trial.stopped = float("inf"), None, None, None, None
    session.add(trial)
    sweep.num_created += 1
    return trial


def add_trial(
    db: Database,
    *,
    caller: Caller,
    sweep_id: str,
    parameters: Mapping[str, Any],
    is_client_retry: bool = False,
) -> tuple[Trial, Job]:
    """A trial of an ask_tell sweep, with parameters of the client's choice.

    is_client_retry: the client says that it sends this again, having had no reply; then the newest trial is its
    answer if it has these parameters.
    """
    check_given(parameters)
    with db.write() as session:
        sweep, now = find_sweep(session, caller.project_id, sweep_id, locked=True), read_clock(session)
        newest = select(Trial).where(Trial.sweep_id == sweep.id, Trial.number == sweep.num_created - 1)
        last = session.scalar(newest) if is_client_retry else None
        if last is not None and last.parameters == dict(parameters):
            return last, session.get_one(Job, last.job_id)
        _check_open(sweep)
        design = design_of(sweep)
        trial = make_trial(session, caller, sweep, design, parameters, now=now)
        if sweep.num_created == sweep.num_trials:
            sweep.is_closed = True
        session.flush()
        return trial, session.get_one(Job, trial.job_id)


def _whole_design(db: Database, request: SweepRequest) -> Design:
    """Every trial is checked, outside the transaction that makes the first."""
    design = designed(request, seed=secrets.randbelow(2**31))
    requests = checked(design)
    if request.search.type != "asha":
        return design
    with db.read() as session:
        file = session.get(File, request.training_file)
    fewest = fewest_steps(requests, num_rows=(file.num_rows if file else None) or 1)
    return replace(design, rungs=rungs(request.search, design, fewest))


def _try(session: Session, caller: Caller, request: JobRequest, *, now: float) -> None:
    """Whether such a job would be accepted; it is not made."""
    with daily.savepoint(session) as attempt:
        submission.submit(session, caller, request, body_digest=None, now=now)
        attempt.rollback()


def _row(caller: Caller, request: SweepRequest, design: Design, *, now: float) -> Sweep:
    return Sweep(
        id=new_id("sweep"),
        project_id=caller.project_id,
        created_at=now,
        created_by=caller.api_key_id,
        requested=request.model_dump(mode="json", exclude_unset=True),
        seed=design.seed,
        num_trials=design.num_trials,
        rungs=None if design.rungs is None else asdict(design.rungs),
        training_file=request.training_file,
        validation_file=request.validation_file,
        state="running",
        num_created=0,
        is_closed=False,
        cancel_requested=False,
    )


def _same_submission(
    session: Session,
    caller: Caller,
    idempotency_key: str | None,
    body_digest: str,
    is_client_retry: bool,
    *,
    now: float,
) -> Sweep | None:
    mine = select(Sweep).where(Sweep.project_id == caller.project_id)
    if idempotency_key is not None:
        used = session.scalar(mine.where(Sweep.idempotency_key == idempotency_key))
        if used is not None and used.body_digest != body_digest:
            raise key_reused(idempotency_key, used.id)
        return used
    if not is_client_retry:
        return None
    same = mine.where(Sweep.created_by == caller.api_key_id, Sweep.created_at > now - CLIENT_RETRY_SECONDS)
    return session.scalar(same.where(Sweep.body_digest == body_digest).order_by(Sweep.created_at.desc()).limit(1))


def _check_open(sweep: Sweep) -> None:
    if sweep.requested["search"]["type"] != "ask_tell":
        raise Conflict(
            f"The sweep {sweep.id} chooses its trials itself.",
            code="not_an_ask_tell_sweep",
            remedy="Make a sweep whose search.type is ask_tell to add trials of your own.",
        )
    if sweep.is_closed or sweep.cancel_requested or sweep.finished_at is not None:
        limit = f" It has all {sweep.num_trials} trials." if sweep.num_created == sweep.num_trials else ""
        raise Conflict(
            f"The sweep {sweep.id} takes no more trials.{limit}",
            code="sweep_closed",
            remedy="Make another one.",
        )
