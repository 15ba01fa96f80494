"""The worker's verbs on plans: claim one that waits, and conclude, fail or release it."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.orm import Session

from catalog.admission.target_layers import retried
from catalog.db import lease
from catalog.db.database import Database, read_clock, skip_locked, upsert
from catalog.errors import StaleClaim
from catalog.lifecycle.preparation import MAX_LOST_PREPARATIONS, FilesToPrepare, longer, lost
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
    """A plan to compute."""

    claim_id: str
    plan_id: str
    files: FilesToPrepare


def claim(db: Database, *, worker_id: str, lease_seconds: float) -> PlanClaim | None:
    """The oldest plan that waits, leased to this worker; None where none does."""
    with db.read() as session:  # most looks find nothing, and keep nobody from writing
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
    """Of two prepared files, for every plan of both."""
    row = {"train_key": train_key, "valid_key": valid_key, "num_rows": num_rows, "of_rows": of_rows}
    with db.write() as session:
        upsert(session, FileOverlap, [row])


def find_overlap(db: Database, *, train_key: str, valid_key: str) -> FileOverlap | None:
    with db.read() as session:
        return session.get(FileOverlap, (train_key, valid_key))


def conclude(db: Database, claim_id: str, *, settings: Settings) -> None:
    """All that the plan needs is on record; where it went away meanwhile, the plan waits again. Raises StaleClaim."""
    retried(lambda: _conclude(db, claim_id, settings=settings))


def _conclude(db: Database, claim_id: str, *, settings: Settings) -> None:
    with db.read() as session:
        plan = _hold(session, claim_id)
        base = session.get_one(BaseModelRow, plan.base_model)
    request, targets = plans.resolve_plan(plan, base)
    with db.write() as session:
        plan, now = _hold(session, claim_id), read_clock(session)
        if not plans.conclude(session, plan, request, targets, now=now, settings=settings):
            _release(plan, run_after=None)


def fail(db: Database, claim_id: str, *, error: Json, wait_seconds: float) -> None:
    """It came to nothing, and another worker may do better: so often and no more. error: code, message, param.
    wait_seconds: after the first time. Raises StaleClaim."""
    with db.write() as session:
        plan = _hold(session, claim_id)
        plan.num_lost += 1
        if plan.num_lost >= MAX_LOST_PREPARATIONS:
            _fail(plan, error)
        else:
            _release(plan, run_after=read_clock(session) + longer(wait_seconds, plan.num_lost))


def release(db: Database, claim_id: str, *, wait_seconds: float = 0) -> None:
    """The worker gives it back: it leaves, or the store did not answer. Raises StaleClaim."""
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
    """Why it can't be computed any more."""
    if plan.num_lost >= MAX_LOST_PREPARATIONS:
        return {"code": "preparation_lost", "message": lost(plan.num_lost), "param": "training_file"}
    base = session.get_one(BaseModelRow, plan.base_model)
    if base.state != "ready" or base.digest != plan.base_digest:
        message = f"The base model {base.name!r} is not there any more as it was when the plan was made."
        return {"code": "base_changed", "message": message, "param": "model"}
    for file_id, param in ((plan.training_file, "training_file"), (plan.validation_file, "validation_file")):
        if file_id is not None and session.get_one(File, file_id).deleted_at is not None:
            return {"code": "file_not_found", "message": f"The file {file_id} was deleted.", "param": param}
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
