"""Creation of sweeps and their trials. A trial is submitted like any job. A repeated submission is the same sweep.

The first trials are created in the transaction of the sweep. The controller creates the others, a few at a time, so
that other processes never wait long to write. The request of a trial is drafted before the transaction that creates it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from catalog.admission.accept import resolve_targets
from catalog.admission.target_layers import Targets, retried
from catalog.audit.log import note
from catalog.caller import Caller
from catalog.db.database import Database, read_clock, serialize
from catalog.errors import Conflict, LorryError
from catalog.fleet import views
from catalog.jobs import submission
from catalog.jobs.submission import CLIENT_RETRY_SECONDS, check_idempotency_key, key_reused
from catalog.spec.job import JobRequest
from catalog.spec.sweep import TPE_AT_ONCE, SweepRequest
from catalog.spec.validation_messages import Problem, field_path
from catalog.sweeps.design import Design, checked, designed, rungs
from catalog.sweeps.study import PastTrial
from catalog.tables.jobs import Sweep, Trial
from catalog.tables.storage import File
from catalog.tables.table import Json, new_id
from catalog.tenancy.authentication import check_valid
from catalog.usage import ledger, quotas

AT_ONCE = 10
"""Maximum number of trials that one transaction creates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drafts:
    """The next trials of a sweep, with numbers from `first`, and the layers that their jobs adapt."""

    first: int
    trials: Sequence[tuple[Json, JobRequest]]
    """The parameters of each trial, and the checked request of its job."""
    targets: Targets
    error: LorryError | None = None
    """Why no more trials than these are possible."""

    def of(self, number: int) -> tuple[Json, JobRequest] | None:
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
    limit = request.max_concurrent or (TPE_AT_ONCE if request.search.type == "tpe" else None)

    def attempt() -> Sweep:
        drafts = draft(db, caller, design, first=0, number=min(AT_ONCE, limit or AT_ONCE))
        if drafts.error is not None:
            raise drafts.error
        with db.write() as session:
            serialize(session, f"sweep of {caller.project_id} {idempotency_key or caller.api_key_id + body_digest}")
            now = read_clock(session)
            earlier = _same_submission(session, caller, idempotency_key, body_digest, is_client_retry, now=now)
            if earlier is not None:
                return earlier
            check_valid(session, caller.api_key_id, now=now)
            sweep = Sweep(
                id=new_id("sweep"),
                project_id=caller.project_id,
                created_at=now,
                created_by=caller.api_key_id,
                idempotency_key=idempotency_key,
                body_digest=body_digest,
                requested=request.model_dump(mode="json", exclude_unset=True),
                seed=design.seed,
                num_trials=design.num_trials,
                max_concurrent=limit,
                rungs=design.rungs,
                training_file=request.training_file,
                validation_file=request.validation_file,
                state="running",
                num_created=0,
                is_closed=False,
                cancel_requested=False,
            )
            _accept(session, caller, sweep, drafts, now=now)
            return sweep

    return retried(attempt)


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


def design_of(sweep: Sweep) -> Design:
    """Return the design of a stored sweep. Raises Conflict if it is from an older version and is not valid any more."""
    try:
        request = SweepRequest.model_validate(sweep.requested)
    except ValidationError as error:
        problem = cast(Problem, error.errors(include_url=False)[0])
        place = field_path(problem["loc"], sweep.requested, is_missing=problem["type"] == "missing")
        raise Conflict("sweep_outdated", sweep=sweep.id, place=place) from error
    return replace(designed(request, seed=sweep.seed), rungs=sweep.rungs)


def draft(
    db: Database, caller: Caller, design: Design, *, first: int, number: int, past: Sequence[PastTrial] = ()
) -> Drafts:
    """Return drafts of up to `number` trials, starting with the number `first`. past: see `suggest`."""
    trials, error = list[tuple[Json, JobRequest]](), None
    try:
        for parameters in design.parameters_of(range(first, min(first + number, design.num_trials)), past):
            trials.append((parameters, design.request_of(parameters)))
    except LorryError as raised:
        error = raised
    targets = resolve_targets(db, caller, [request for _, request in trials])
    return Drafts(first=first, trials=trials, targets=targets, error=error)


def make_trials(session: Session, caller: Caller, sweep: Sweep, drafts: Drafts, *, limit: int, now: float) -> int:
    """Create up to `limit` of the drafted trials that no other process has created, as jobs of the sweep's creator.

    Returns how many. The caller has locked the sweep, or it is not visible to others yet. Raises the same errors as
    submission; the trials before the error stay.
    """
    defaults = views.fleet_defaults(session, now=now)
    for num_made in range(min(limit, sweep.num_trials - sweep.num_created)):
        found = drafts.of(sweep.num_created)
        if found is None:
            if drafts.error is not None:
                raise drafts.error
            return num_made
        parameters, request = found
        options: Json = {"body_digest": None, "now": now, "sweep_id": sweep.id, "fleet_defaults": defaults}
        with ledger.savepoint(session):
            job = submission.submit(session, caller, request, drafts.targets, **options)
            trial = Trial(job_id=job.id, sweep_id=sweep.id, number=sweep.num_created, parameters=parameters)
            trial.score = float("inf")
            session.add(trial)
            sweep.num_created += 1
    return limit


def _whole_design(db: Database, request: SweepRequest) -> Design:
    """Return the design of the sweep. Checks all trials, outside the transaction that creates the first ones."""
    design = designed(request, seed=secrets.randbelow(2**31))
    requests = checked(design)
    if not request.search.is_pruned:
        return design
    with db.read() as session:
        file = session.get(File, request.training_file)
    return replace(design, rungs=rungs(design, requests, num_rows=(file.num_rows if file else None) or 1))


def _accept(session: Session, caller: Caller, sweep: Sweep, drafts: Drafts, *, now: float) -> None:
    quotas.check_key(session, caller, num_jobs=sweep.num_trials, now=now)
    with ledger.savepoint(session) as attempt:  # raises what is wrong, for example with a file, before the sweep exists
        submission.submit(session, caller, drafts.trials[0][1], drafts.targets, body_digest=None, now=now)
        attempt.rollback()
    session.add(sweep)
    session.flush()
    details = {"model": sweep.requested["model"], "search": sweep.requested["search"]["type"]}
    details |= {"trials": sweep.num_trials}
    note(session, "sweep.created", now=now, object_id=sweep.id, project_id=sweep.project_id, details=details)
    make_trials(session, caller, sweep, drafts, limit=len(drafts.trials), now=now)
    sweep.due_at = now if sweep.num_created < sweep.num_trials else None


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
