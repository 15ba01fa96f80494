"""The work of workers on plans: read the inputs of a claimed plan, and store its result or its failure."""

from __future__ import annotations

from sqlalchemy.orm import Session

from catalog.admission.target_layers import retried
from catalog.db.database import Database, read_clock, upsert
from catalog.error_texts import ErrorText
from catalog.errors import StaleClaim
from catalog.lifecycle.preparation import FilesToPrepare
from catalog.plans import plans
from catalog.settings import Settings
from catalog.spec.job import JobSpec
from catalog.tables.jobs import FileOverlap, Plan
from catalog.tables.storage import BaseModelRow, File
from catalog.tables.table import Json
from catalog.tasks import task_queue
from catalog.tasks.outcomes import TaskSubject
from catalog.tasks.task_queue import TaskClaim


def begin(db: Database, task: TaskClaim) -> FilesToPrepare | None:
    """Return the files of a claimed plan. Raises StaleClaim.

    Returns None if the plan can't be computed any more. Then it has failed.
    """
    with db.write() as session:
        plan = task_queue.hold(session, task, Plan)
        error = _hindrance(session, plan)
        if error is not None:
            plan.state, plan.error = "failed", error
            task_queue.finish(session, task)
            return None
        return FilesToPrepare(
            project_id=plan.project_id,
            base=session.get_one(BaseModelRow, plan.base_model),
            base_digest=plan.base_digest,
            spec=JobSpec.model_validate(plan.spec),
            training=session.get_one(File, plan.training_file),
            train_key=plan.train_prepared,
            validation=session.get_one(File, plan.validation_file) if plan.validation_file else None,
            valid_key=plan.valid_prepared,
        )


def record_overlap(db: Database, *, train_key: str, valid_key: str, num_rows: int, of_rows: int) -> None:
    """Store how many rows two prepared files have in common. Every plan with these files uses it."""
    row = {"train_key": train_key, "valid_key": valid_key, "num_rows": num_rows, "of_rows": of_rows}
    with db.write() as session:
        upsert(session, FileOverlap, [row])


def find_overlap(db: Database, *, train_key: str, valid_key: str) -> FileOverlap | None:
    with db.read() as session:
        return session.get(FileOverlap, (train_key, valid_key))


def conclude(db: Database, task: TaskClaim, *, settings: Settings) -> None:
    """Compute the plan from the stored preparation results. Raises StaleClaim.

    If a result was deleted in the meantime, the plan waits again.
    """
    retried(lambda: _conclude(db, task, settings=settings))


def _conclude(db: Database, task: TaskClaim, *, settings: Settings) -> None:
    with db.read() as session:
        plan = session.get(Plan, task.subject)
        if plan is None:
            raise StaleClaim(task.claim_id)
        base = session.get_one(BaseModelRow, plan.base_model)
    request, targets = plans.resolve_plan(plan, base)
    with db.write() as session:
        plan, now = task_queue.hold(session, task, Plan), read_clock(session)
        if plans.conclude(session, plan, request, targets, now=now, settings=settings):
            task_queue.finish(session, task)
        else:
            task_queue.release_in(session, task)


def _fail_plan(_session: Session, plan: Plan, error: ErrorText, _is_refused: bool) -> None:
    plan.state, plan.error = "failed", error.as_job_error()


def _postpone_plan(_session: Session, _plan: Plan, _error: ErrorText | None, _run_after: float | None) -> None:
    """The plan is still `computing`."""


PLAN = TaskSubject(table=Plan, lost="preparation_lost", fail=_fail_plan, postpone=_postpone_plan)


def _hindrance(session: Session, plan: Plan) -> Json | None:
    """Return the error of a plan that can no longer be computed, or None."""
    base = session.get_one(BaseModelRow, plan.base_model)
    if base.state == "deleted":
        return ErrorText.of("plan_base_deleted", base=base.name, param="model").as_job_error()
    if base.state != "ready" or base.digest != plan.base_digest:
        return ErrorText.of("plan_base_changed", base=base.name, param="model").as_job_error()
    for file_id, param in ((plan.training_file, "training_file"), (plan.validation_file, "validation_file")):
        if file_id is not None and session.get_one(File, file_id).deleted_at is not None:
            return ErrorText.of("plan_file_deleted", file=file_id, param=param).as_job_error()
    return None
