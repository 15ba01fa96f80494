"""Whether work waits for a worker: base models to import, files to tokenize, plans to compute, jobs to train."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Select, and_, or_, select

from catalog.db.database import Database, read_clock
from catalog.states import JobState
from catalog.tables.jobs import Job
from catalog.tables.plans import Plan
from catalog.tables.storage import BaseModelRow


def has_work(db: Database) -> bool:
    """Whether an idle worker would find anything to do now."""
    with db.read() as session:
        now = read_clock(session)
        is_due = or_(Job.run_after.is_(None), Job.run_after <= now)
        is_unclaimed = and_(Job.state.in_((JobState.QUEUED, JobState.VALIDATING_FILES)), Job.claim_id.is_(None))
        is_free = or_(BaseModelRow.importing_until.is_(None), BaseModelRow.importing_until <= now)
        jobs = select(Job.id).where(is_unclaimed, is_due, or_(~Job.is_held, Job.state != JobState.QUEUED)).limit(1)
        imports = select(BaseModelRow.name).where(BaseModelRow.state == "importing", is_free).limit(1)
        plans = select(Plan.id).where(plan_is_waiting(now=now)).limit(1)
        return any(session.scalar(some) is not None for some in (jobs, imports, plans))


def first_plan(*, now: float) -> Select[Plan]:
    """The oldest plan that a worker may claim now."""
    return select(Plan).where(plan_is_waiting(now=now)).order_by(Plan.created_at).limit(1)


def plan_is_waiting(*, now: float) -> ColumnElement[bool]:
    """No worker has a valid lease on the plan."""
    is_free = or_(Plan.lease_expires_at.is_(None), Plan.lease_expires_at <= now)
    return and_(Plan.state == "computing", is_free, or_(Plan.run_after.is_(None), Plan.run_after <= now))
