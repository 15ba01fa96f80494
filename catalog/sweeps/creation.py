"""Creation of sweeps and their trials. A trial is submitted like any job. A repeated submission is the same sweep.

The first trials are created in the transaction of the sweep. The controller creates the others, a few at a time, so
that other processes never wait long to write. The request of a trial is drafted before the transaction that creates it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from catalog.admission.accept import resolve_targets
from catalog.admission.target_layers import Targets, retried
from catalog.audit.log import note
from catalog.caller import Caller
from catalog.db.database import Database, read_clock, serialize
from catalog.errors import Conflict
from catalog.fleet import views
from catalog.jobs import submission
from catalog.jobs.submission import CLIENT_RETRY_SECONDS, check_idempotency_key, key_reused
from catalog.search.design import Design, check_given, checked, designed, fewest_steps, rungs
from catalog.search.spec import SweepRequest
from catalog.search.trials import design_of, find_sweep
from catalog.spec.job import FleetDefaults, JobRequest
from catalog.tables.jobs import Job
from catalog.tables.storage import File
from catalog.tables.sweeps import Sweep, Trial
from catalog.tables.table import new_id
from catalog.tenancy.authentication import check_valid
from catalog.usage import ledger, quotas

AT_ONCE = 10
"""Maximum number of trials that one transaction creates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A trial that can be created: its parameters, and the checked request of its job."""

    parameters: Mapping[str, Any]
    request: JobRequest
    is_promised: bool
    """The trial was counted against the key's daily limit when its sweep was accepted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drafts:
    """The next trials of a sweep, starting with number `first`, and the layers that their jobs adapt."""

    first: int
    trials: Sequence[Draft]
    targets: Targets

    def of(self, number: int) -> Draft | None:
        """Return the draft of the trial with this number, or None."""
        return self.trials[number - self.first] if 0 <= number - self.first < len(self.trials) else None


def create(
    db: Database,
    *,
    caller: Caller,
    request: SweepRequest,
    idempotency_key: str | None = None,
    body_digest: str,
    is_client_retry: bool = False,
) -> Sweep:
    """Create a sweep with its first trials, or return the sweep of an earlier, equal submission.

    The arguments and errors are those of `submission.create`. If any trial raises, nothing is created.
    """
    check_idempotency_key(idempotency_key)
    design = _whole_design(db, request)

    def attempt() -> Sweep:
        drafts = _first_drafts(db, caller, request, design)
        with db.write() as session:
            serialize(session, f"sweep of {caller.project_id} {idempotency_key or caller.api_key_id + body_digest}")
            now = read_clock(session)
            earlier = _same_submission(session, caller, idempotency_key, body_digest, is_client_retry, now=now)
            if earlier is not None:
                return earlier
            check_valid(session, caller.api_key_id, now=now)
            sweep = _row(caller, request, design, now=now)
            sweep.idempotency_key, sweep.body_digest = idempotency_key, body_digest
            _accept(session, caller, sweep, design, drafts, now=now)
            return sweep

    return retried(attempt)


def _first_drafts(db: Database, caller: Caller, request: SweepRequest, design: Design) -> Drafts:
    """Return drafts of the trials that are created with the sweep. An ask_tell sweep has none: its draft without
    parameters represents what its trials share, and is only checked."""
    if design.search == "ask_tell":
        trials = [draft_of(design, {})]
    else:
        number = min(AT_ONCE, request.max_concurrent or AT_ONCE, design.num_trials)
        trials = [draft_of(design, design.parameters_of(each)) for each in range(number)]
    return Drafts(first=0, trials=trials, targets=resolve_targets(db, caller, [draft.request for draft in trials]))


def _accept(session: Session, caller: Caller, sweep: Sweep, design: Design, drafts: Drafts, *, now: float) -> None:
    is_chosen_here = design.search != "ask_tell"
    if is_chosen_here:
        quotas.check_key(session, caller, num_jobs=design.num_trials, now=now)
    _try(session, caller, drafts, now=now)
    session.add(sweep)
    session.flush()
    details = {"model": sweep.requested["model"], "search": design.search, "trials": design.num_trials}
    note(session, "sweep.created", now=now, object_id=sweep.id, project_id=sweep.project_id, details=details)
    if is_chosen_here:
        defaults = views.fleet_defaults(session, now=now)
        for draft in drafts.trials:
            make_trial(session, caller, sweep, draft, drafts.targets, now=now, fleet_defaults=defaults)
    sweep.due_at = now if is_chosen_here and sweep.num_created < sweep.num_trials else None


def made_before(
    db: Database, *, caller: Caller, idempotency_key: str | None, body_digest: str, is_client_retry: bool
) -> Sweep | None:
    """Return the sweep of an earlier, equal submission, or None. Raises Conflict if the idempotency key was used with
    another body."""
    if idempotency_key is None and not is_client_retry:
        return None  # no submission can repeat an earlier one, so this needs no transaction
    with db.read() as session:
        now = read_clock(session)
        return _same_submission(session, caller, idempotency_key, body_digest, is_client_retry, now=now)


def draft_of(design: Design, parameters: Mapping[str, Any]) -> Draft:
    """Return the draft of a trial. Raises InvalidRequest for parameters with which no job is possible."""
    return Draft(
        parameters=dict(parameters),
        request=design.request_of(parameters),
        is_promised=design.search != "ask_tell",
    )


def make_trial(
    session: Session,
    caller: Caller,
    sweep: Sweep,
    draft: Draft,
    targets: Targets,
    *,
    now: float,
    fleet_defaults: FleetDefaults | None = None,
) -> Trial:
    """Create the trial with the next number, as a job of the sweep's creator.

    The caller has locked the sweep, or it is not visible to others yet. fleet_defaults: see `accept`. Raises the same
    errors as submission.
    """
    job = submission.submit(
        session,
        caller,
        draft.request,
        targets,
        body_digest=None,
        now=now,
        sweep_id=sweep.id,
        is_promised=draft.is_promised,
        fleet_defaults=fleet_defaults,
    )
    trial = Trial(job_id=job.id, sweep_id=sweep.id, number=sweep.num_created, parameters=dict(draft.parameters))
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
    """Create a trial of an ask_tell sweep with the client's parameters.

    is_client_retry: the client repeats a request that had no reply; the newest trial is then returned if it has these
    parameters.
    """
    check_given(parameters)
    return retried(lambda: _add_trial(db, caller, sweep_id, parameters, is_client_retry=is_client_retry))


def _add_trial(
    db: Database, caller: Caller, sweep_id: str, parameters: Mapping[str, Any], *, is_client_retry: bool
) -> tuple[Trial, Job]:
    with db.read() as session:
        sweep = find_sweep(session, caller.project_id, sweep_id)
    _check_ask_tell(sweep)
    draft = draft_of(design_of(sweep), parameters)
    targets = resolve_targets(db, caller, [draft.request])
    with db.write() as session:
        sweep, now = find_sweep(session, caller.project_id, sweep_id, locked=True), read_clock(session)
        newest = select(Trial).where(Trial.sweep_id == sweep.id, Trial.number == sweep.num_created - 1)
        last = session.scalar(newest) if is_client_retry else None
        if last is not None and last.parameters == dict(parameters):
            return last, session.get_one(Job, last.job_id)
        _check_open(sweep)
        check_valid(session, caller.api_key_id, now=now)
        trial = make_trial(session, caller, sweep, draft, targets, now=now)
        if sweep.num_created == sweep.num_trials:
            sweep.is_closed = True
        session.flush()
        return trial, session.get_one(Job, trial.job_id)


def _whole_design(db: Database, request: SweepRequest) -> Design:
    """Return the design of the sweep. Checks all trials, outside the transaction that creates the first ones."""
    design = designed(request, seed=secrets.randbelow(2**31))
    requests = checked(design)
    if request.search.type != "asha":
        return design
    with db.read() as session:
        file = session.get(File, request.training_file)
    fewest = fewest_steps(requests, num_rows=(file.num_rows if file else None) or 1)
    return replace(design, rungs=rungs(request.search, design, fewest))


def _try(session: Session, caller: Caller, drafts: Drafts, *, now: float) -> None:
    """Submit the first draft in a savepoint and roll it back. Raises if the job would be rejected."""
    with ledger.savepoint(session) as attempt:
        submission.submit(session, caller, drafts.trials[0].request, drafts.targets, body_digest=None, now=now)
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
    own = select(Sweep).where(Sweep.project_id == caller.project_id)
    if idempotency_key is not None:
        used = session.scalar(own.where(Sweep.idempotency_key == idempotency_key))
        if used is not None and used.body_digest != body_digest:
            raise key_reused(idempotency_key, f"sweep {used.id}")
        return used
    if not is_client_retry:
        return None
    same = own.where(Sweep.created_by == caller.api_key_id, Sweep.created_at > now - CLIENT_RETRY_SECONDS)
    return session.scalar(same.where(Sweep.body_digest == body_digest).order_by(Sweep.created_at.desc()).limit(1))


def _check_ask_tell(sweep: Sweep) -> None:
    search_type = sweep.requested["search"]["type"]
    if search_type != "ask_tell":
        raise Conflict(
            f"Sweep {sweep.id} has the search type {search_type!r}, so it creates its own trials.",
            code="not_an_ask_tell_sweep",
            remedy="To add trials yourself, create a sweep with search.type 'ask_tell'.",
        )


def _check_open(sweep: Sweep) -> None:
    if sweep.is_closed or sweep.cancel_requested or sweep.finished_at is not None:
        why = _why_closed(sweep)
        raise Conflict(
            f"No more trials can be added to sweep {sweep.id}, because {why}.",
            code="sweep_closed",
            remedy="To run more trials, create a new sweep.",
        )


def _why_closed(sweep: Sweep) -> str:
    if sweep.cancel_requested:
        return "it was cancelled"
    if sweep.num_created == sweep.num_trials:
        return f"it already has as many trials as search.trials allows ({sweep.num_trials})"
    if sweep.error is not None:
        return f"it was closed with the error {sweep.error['code']}"
    return "it has finished" if sweep.finished_at is not None else "it was closed"
