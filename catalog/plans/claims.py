"""Lets workers claim a waiting plan, and conclude, fail or release it."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.orm import Session

from catalog.admission.target_layers import retried
from catalog.db import lease
from catalog.db.database import Database, read_clock, skip_locked, upsert
from catalog.errors import StaleClaim
from catalog.lifecycle.preparation import MAX_LOST_PREPARATIONS, FilesToPrepare, lost, retry_wait
from catalog.plans import plans
from catalog.queue import pending
from catalog.settings import Settings
from catalog.spec.job import JobSpec
from catalog.tables.fleet import Worker
from catalog.tables.plans import FileOverlap, Plan
from catalog.tables.storage import BaseModelRow, File
from catalog.tables.table import Json


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanClaim:
    """A plan that this worker computes."""

    claim_id: str
    plan_id: str
    files: FilesToPrepare


def claim(db: Database, *, worker_id: str, lease_seconds: float) -> PlanClaim | None:
    """Lease the oldest waiting plan to this worker. Returns None if no plan waits."""
    with db.read() as session:  # most polls find no plan, and a read transaction blocks no writer
        if session.scalar(pending.first_plan(now=read_clock(session))) is None:
            return None
    with db.write() as session:
        now = read_clock(session)
        worker = session.get(Worker, worker_id)
        if worker is not None and worker.takes_nothing_new:
            return None
        while (plan := session.scalar(skip_locked(pending.first_plan(now=now)))) is not None:
            plan.num_lost += plan.claim_id is not None
            error = _hindrance(session, plan)
            if error is None:
                claim_id = lease.acquire(plan, now=now, lease_seconds=lease_seconds, prefix="planning")
                return _claim(session, plan, claim_id)
            _fail(plan, error)
            session.flush()
        return None


def record_overlap(db: Database, *, train_key: str, valid_key: str, num_rows: int, of_rows: int) -> None:
    """Store how many rows two prepared files have in common. Every plan with these files uses it."""
    row = {"train_key": train_key, "valid_key": valid_key, "num_rows": num_rows, "of_rows": of_rows}
    with db.write() as session:
        upsert(session, FileOverlap, [row])


def find_overlap(db: Database, *, train_key: str, valid_key: str) -> FileOverlap | None:
    with db.read() as session:
        return session.get(FileOverlap, (train_key, valid_key))


def conclude(db: Database, claim_id: str, *, settings: Settings) -> None:
    """Compute the plan from the stored preparation results. Raises StaleClaim.

    If a result was deleted in the meantime, the plan is released and waits again.
    """
    retried(lambda: _finish(db, claim_id, settings=settings))


def _finish(db: Database, claim_id: str, *, settings: Settings) -> None:
    with db.read() as session:
        plan = _hold(session, claim_id)
        base = session.get_one(BaseModelRow, plan.base_model)
    request, targets = plans.resolve_plan(plan, base)
    with db.write() as session:
        plan, now = _hold(session, claim_id), read_clock(session)
        if not plans.conclude(session, plan, request, targets, now=now, settings=settings):
            _release(plan, run_after=None)


def fail(db: Database, claim_id: str, *, error: Json) -> None:
    """Release a plan that this worker could not compute, so that another retries. Raises StaleClaim.

    After MAX_LOST_PREPARATIONS failures the plan fails with `error`: code, message, param.
    """
    with db.write() as session:
        plan = _hold(session, claim_id)
        plan.num_lost += 1
        if plan.num_lost >= MAX_LOST_PREPARATIONS:
            _fail(plan, error)
        else:
            _release(plan, run_after=read_clock(session) + retry_wait(plan.num_lost))


def release(db: Database, claim_id: str, *, wait_seconds: float = 0) -> None:
    """Release the plan, because the worker exits or the store did not answer. Raises StaleClaim."""
    with db.write() as session:
        plan = _hold(session, claim_id)
        _release(plan, run_after=read_clock(session) + wait_seconds if wait_seconds else None)


def _claim(session: Session, plan: Plan, claim_id: str) -> PlanClaim:
    validation = session.get_one(File, plan.validation_file) if plan.validation_file else None
    files = FilesToPrepare(
        project_id=plan.project_id,
        base=session.get_one(BaseModelRow, plan.base_model),
        base_digest=plan.base_digest,
        spec=JobSpec.model_validate(plan.spec),
        training=session.get_one(File, plan.training_file),
        train_key=plan.train_prepared,
        validation=validation,
        valid_key=plan.valid_prepared,
    )
    return PlanClaim(claim_id=claim_id, plan_id=plan.id, files=files)


def _hindrance(session: Session, plan: Plan) -> Json | None:
    """The error of a plan that can no longer be computed, or None."""
    if plan.num_lost >= MAX_LOST_PREPARATIONS:
        return {"code": "preparation_lost", "message": lost(plan.num_lost), "param": "training_file"}
    base = session.get_one(BaseModelRow, plan.base_model)
    if base.state == "deleted":
        message = f"Base model {base.name!r} was deleted. Create a new plan with another base model."
        return {"code": "base_changed", "message": message, "param": "model"}
    if base.state != "ready" or base.digest != plan.base_digest:
        message = f"Base model {base.name!r} was changed after the plan was created. Create a new plan."
        return {"code": "base_changed", "message": message, "param": "model"}
    for file_id, param in ((plan.training_file, "training_file"), (plan.validation_file, "validation_file")):
        if file_id is not None and session.get_one(File, file_id).deleted_at is not None:
            message = f"File {file_id} was deleted. Upload it again, and create a new plan with the new file's ID."
            return {"code": "file_not_found", "message": message, "param": param}
    return None


def _hold(session: Session, claim_id: str) -> Plan:
    plan = lease.held(session, Plan, claim_id)
    if plan is None:
        raise StaleClaim(claim_id)
    return plan


def _release(plan: Plan, *, run_after: float | None) -> None:
    lease.release(plan)
    plan.run_after = run_after


def _fail(plan: Plan, error: Json) -> None:
    _release(plan, run_after=None)
    plan.state, plan.error = "failed", error
