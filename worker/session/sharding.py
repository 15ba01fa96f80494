"""How a trainer of this worker places the base of a job on the worker's devices, by catalog/resources/sharding.py."""

from __future__ import annotations

from catalog.registry import base_models
from catalog.resources import requirements
from catalog.resources.sharding import Demand, Strategy, reason
from catalog.tables.jobs import Job
from catalog.tables.table import Json
from worker.context.context import WorkerContext


def strategy_for(context: WorkerContext, job: Job, *, description: Json | None = None) -> Strategy:
    """How a trainer here holds the base for such a job: the same for all that train with it. description: the base's;
    it is read where None."""
    return context.group.strategy(_demand(context, job, description))


def reason_for(context: WorkerContext, job: Job) -> str:
    """Why that is so, for people."""
    return reason(context.group, _demand(context, job, None))


def _demand(context: WorkerContext, job: Job, description: Json | None) -> Demand:
    if description is None:
        description = base_models.get(context.db, job.base_model).description or {}
    return requirements.demand(job, description, recomputes=context.device.recomputes)
