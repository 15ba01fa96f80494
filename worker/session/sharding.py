"""Chooses how a trainer of this worker holds the base model of a job, by catalog/resources/sharding.py."""

from __future__ import annotations

from catalog.registry import base_models
from catalog.resources import requirements
from catalog.resources.sharding import Demand, Strategy, reason
from catalog.tables.jobs import Job
from catalog.tables.table import Json
from worker.context.context import WorkerContext


def strategy_for(context: WorkerContext, job: Job, *, description: Json | None = None) -> Strategy:
    """Return how a trainer on this worker holds the base model for such a job and all its packmates. description: of
    the base model; read from the database if None."""
    return context.group.strategy(_demand(context, job, description))


def reason_for(context: WorkerContext, job: Job) -> str:
    """Return the reason for this strategy, for users."""
    return reason(context.group, _demand(context, job, None))


def _demand(context: WorkerContext, job: Job, description: Json | None) -> Demand:
    if description is None:
        description = base_models.get(context.db, job.base_model).description or {}
    return requirements.demand(job, description, recomputes=context.device.recomputes)
