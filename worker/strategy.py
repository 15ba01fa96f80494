"""How a trainer of this worker holds the base of a job: by the rule of catalog/dividing.py, on the worker's devices."""

from __future__ import annotations

from catalog import bases, needs
from catalog.dividing import Demand, Strategy, reason
from catalog.tables import Job, Json
from worker.context import WorkerContext


def strategy_for(context: WorkerContext, job: Job, *, description: Json | None = None) -> Strategy:
    """How a trainer here holds the base for such a job: the same for all that train with it. description: the base's;
    it is read where None."""
    return context.group.strategy(_demand(context, job, description))


def reason_for(context: WorkerContext, job: Job) -> str:
    """Why that is so, for people."""
    return reason(context.group, _demand(context, job, None))


def _demand(context: WorkerContext, job: Job, description: Json | None) -> Demand:
    if description is None:
        description = bases.get(context.db, job.base_model).description or {}
    return needs.demand(job, description, recomputes=context.device.recomputes)
