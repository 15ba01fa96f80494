"""Plans: dry runs of jobs. This module has the operations of users; claims.py has those of workers.

A plan is accepted like a job, and then waits for the preparation results of its files. It has no state machine: it is
computed once and then kept until it expires.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from catalog.admission.accept import Accepted, accept, find_cautions, job_row, resolve_targets
from catalog.admission.target_layers import Targets, retried
from catalog.db.database import Database, read_clock, serialize
from catalog.db.pagination import Page, paginate
from catalog.error_texts import ErrorText
from catalog.errors import Conflict, Forbidden, NotFound
from catalog.plans.estimator import TokenizedData, estimate_plan
from catalog.settings import Settings
from catalog.spec.job import JobRequest, JobSpec
from catalog.storage import quota, token_cache
from catalog.tables.jobs import FileOverlap, Plan
from catalog.tables.storage import BaseModelRow, File, Prepared
from catalog.tables.table import Json, new_id
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskKind
from catalog.tenancy.authentication import Caller
from catalog.usage import ledger, quotas

PLAN_SECONDS = 7 * 24 * 3600.0
"""Lifetime of a plan."""
MAX_COMPUTING = 16
"""Maximum number of a project's plans that wait to be computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileDetails:
    """Details of the rows of a plan's files. None if a file is not prepared or was deleted, because it quotes rows."""

    training: Json | None
    validation: Json | None


def create(db: Database, *, caller: Caller, request: JobRequest, settings: Settings) -> Plan:
    """Create a plan. It is rejected like a job would be, and is ready at once if its files are already prepared.

    Raises InvalidRequest, NotFound, QuotaExceeded, Forbidden if a worker must prepare the files and the key lacks
    jobs:write, and Conflict if the project has too many waiting plans.
    """
    return retried(lambda: _create(db, caller, request, settings=settings))


def _create(db: Database, caller: Caller, request: JobRequest, *, settings: Settings) -> Plan:
    targets = resolve_targets(db, caller, [request])
    with db.write() as session:
        serialize(session, f"plan {caller.project_id}")
        now = read_clock(session)
        quotas.check_priority(session, caller, request.priority)
        accepted = accept(session, caller, request, now=now, seed=secrets.randbelow(2**31))
        # Rejects layers that the base model doesn't have.
        job_row(accepted, targets, project_id=caller.project_id, created_by=caller.api_key_id, now=now)
        plan = _row(accepted, caller, now=now)
        conclude(session, plan, accepted.request, targets, now=now, settings=settings)
        is_computed = plan.state == "computing"
        if is_computed:
            _check_scope(caller)
            _check_num_plans(session, caller.project_id)
        quotas.check_plan(session, caller, is_computed=is_computed, now=now)
        session.add(plan)
        if is_computed:
            quota.check_preparation(session, plan, now=now)
            ledger.add_plan(session, plan, now=now)
            task_queue.add(session, TaskKind.PLAN, plan.id, project_id=plan.project_id, run_after=now)
        return plan


def get(db: Database, *, project_id: str, plan_id: str) -> Plan:
    """Return the plan. Raises NotFound, also for an expired plan."""
    with db.read() as session:
        return find(session, project_id=project_id, plan_id=plan_id)


def list_page(db: Database, *, project_id: str, after: str | None = None, limit: int = 20) -> Page[Plan]:
    """Return a page of the project's plans, newest first."""
    scope = select(Plan).where(Plan.project_id == project_id)
    with db.read() as session:
        visible = (Plan.expires_at > read_clock(session),)
        return paginate(
            session, scope, created=Plan.created_at, ident=Plan.id, after=after, limit=limit, visible=visible
        )


def delete(db: Database, *, project_id: str, plan_id: str) -> None:
    """Delete the plan. Jobs that were created from it stay. Raises NotFound."""
    with db.write() as session:
        session.delete(find(session, project_id=project_id, plan_id=plan_id, lock=True))
        task_queue.remove(session, TaskKind.PLAN, plan_id)


def details(db: Database, plan: Plan) -> FileDetails:
    """Return sample rows of the plan's files, and the line numbers of unusual rows."""
    with db.read() as session:
        return FileDetails(
            training=_details(session, plan.training_file, plan.train_prepared),
            validation=_details(session, plan.validation_file, plan.valid_prepared),
        )


def find(session: Session, *, project_id: str, plan_id: str, lock: bool = False) -> Plan:
    """Return the plan within a transaction. Raises NotFound."""
    owned = select(Plan).where(Plan.id == plan_id, Plan.project_id == project_id)
    plan = session.scalar(owned.with_for_update(of=Plan) if lock else owned)
    if plan is None or plan.expires_at <= read_clock(session):
        raise NotFound("plan_not_found", plan_id=plan_id, plan_seconds=PLAN_SECONDS / 86400, param="plan")
    return plan


def resolve_plan(plan: Plan, base: BaseModelRow) -> tuple[JobRequest, Targets]:
    """Return the inputs of `conclude`: the plan's parsed request and the layers of its job.

    Call it outside a transaction, which must not wait for this computation.
    """
    targets = Targets()
    targets.resolve(base, JobSpec.model_validate(plan.spec).lora)
    return JobRequest.model_validate(plan.requested), targets


def conclude(
    session: Session, plan: Plan, request: JobRequest, targets: Targets, *, now: float, settings: Settings
) -> bool:
    """Set the plan to ready or failed if its files are prepared. Returns whether they are.

    request, targets: from `resolve_plan`. Raises TargetsOutdated if the base model has changed since.
    """
    error = _refusal(session, plan.train_prepared, "training_file") or _refusal(
        session, plan.valid_prepared, "validation_file"
    )
    data = None if error else _data(session, plan)
    if error is None and data is None:
        return False
    plan.state, plan.error = ("failed", error) if error else ("ready", None)
    if data is not None:
        accepted = _recall(session, plan, request)
        job = job_row(accepted, targets, project_id=plan.project_id, created_by=plan.created_by, now=now)
        layers = targets.of(accepted.base, accepted.spec.lora, parent=accepted.spec.parent)
        plan.found = estimate_plan(session, job, accepted, data, targets=layers, now=now, settings=settings)
    return True


def _recall(session: Session, plan: Plan, request: JobRequest) -> Accepted:
    """Rebuild the accepted job of the plan from the current rows."""
    spec = JobSpec.model_validate(plan.spec)
    training = session.get_one(File, plan.training_file)
    validation = session.get_one(File, plan.validation_file) if plan.validation_file else None
    return Accepted(
        request=request,
        spec=spec,
        base=session.get_one(BaseModelRow, plan.base_model),
        training=training,
        validation=validation,
        cautions=tuple(find_cautions(request, spec, training, validation)),
    )


def _row(accepted: Accepted, caller: Caller, *, now: float) -> Plan:
    base, spec, validation = accepted.base, accepted.spec, accepted.validation
    assert base.digest is not None
    return Plan(
        id=new_id("plan"),
        project_id=caller.project_id,
        created_at=now,
        created_by=caller.api_key_id,
        expires_at=now + PLAN_SECONDS,
        state="computing",
        base_model=base.name,
        base_digest=base.digest,
        requested=accepted.request.model_dump(mode="json", exclude_unset=True),
        spec=spec.model_dump(mode="json"),
        training_file=accepted.training.id,
        validation_file=validation.id if validation else None,
        train_prepared=token_cache.key_of(caller.project_id, base, accepted.training, spec),
        valid_prepared=validation and token_cache.key_of(caller.project_id, base, validation, spec),
    )


def _check_scope(caller: Caller) -> None:
    if "jobs:write" not in caller.scopes:
        raise Forbidden("missing_scope_for_plan", caller=caller.name)


def _check_num_plans(session: Session, project_id: str) -> None:
    waiting = select(func.count()).where(Plan.state == "computing", Plan.project_id == project_id)
    if (session.scalar(waiting) or 0) >= MAX_COMPUTING:
        raise Conflict("too_many_plans", max_computing=MAX_COMPUTING)


def _refusal(session: Session, key: str | None, param: str) -> Json | None:
    """The rejection of a file as a job's error, or None."""
    row = session.get(Prepared, key) if key else None
    if row is None or "refusal" not in row.report:
        return None
    return ErrorText(**row.report["refusal"], param=param).as_job_error()


def _data(session: Session, plan: Plan) -> TokenizedData | None:
    """The preparation results of the plan's files, or None if some are missing. Their tokens may have been evicted."""
    train = session.get(Prepared, plan.train_prepared)
    if train is None:
        return None
    if plan.valid_prepared is None:
        return TokenizedData(training=train.report, validation=None, overlap=None)
    valid = session.get(Prepared, plan.valid_prepared)
    overlap = session.get(FileOverlap, (plan.train_prepared, plan.valid_prepared))
    if valid is None or overlap is None:
        return None
    return TokenizedData(training=train.report, validation=valid.report, overlap=(overlap.num_rows, overlap.of_rows))


def _details(session: Session, file_id: str | None, key: str | None) -> Json | None:
    file = session.get(File, file_id) if file_id else None
    row = session.get(Prepared, key) if key else None
    return row.details if file is not None and file.deleted_at is None and row is not None else None
