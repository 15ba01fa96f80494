"""Chooses how a trainer of this worker holds the base model of a job, by catalog/resources/sharding.py."""

from __future__ import annotations

from dataclasses import dataclass

from catalog.registry import base_models
from catalog.resources import requirements
from catalog.resources.memory import BaseModelMemory
from catalog.resources.pack_key import precision_of, quantization_of
from catalog.resources.sharding import Demand, Strategy, block_bytes, hindrance, reason
from catalog.tables.jobs import Job
from worker.context.context import WorkerContext


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseToLoad:
    """A base model that is loaded because requests wait for it. A trainer for jobs has these attributes of its first
    job."""

    trainer_id: str
    base_model: str
    base_digest: str
    pack_key: str


def strategy_for(context: WorkerContext, job: Job | BaseToLoad) -> Strategy:
    """Return how a trainer on this worker holds the base model for such a job and all its packmates, or for inference
    requests."""
    demand = _demand(context, job) if isinstance(job, Job) else base_demand(context, job)
    return context.group.strategy(demand)


def reason_for(context: WorkerContext, job: Job) -> str:
    """Return the reason for this strategy, for users."""
    return reason(context.group, _demand(context, job))


def base_demand(context: WorkerContext, base: BaseToLoad) -> Demand:
    """Return the memory that a trainer without jobs needs."""
    description = base_models.get(context.db, base.base_model).description or {}
    precision, quantization = precision_of(base.pack_key), quantization_of(base.pack_key)
    can_shard = hindrance({}, quantization, description) is None
    shardable_bytes, gathered_bytes = block_bytes(description, precision) if can_shard else (0, 0)
    return Demand(
        whole_bytes=BaseModelMemory(description, precision, quantization).trainer_bytes(),
        shardable_bytes=shardable_bytes,
        gathered_bytes=gathered_bytes,
    )


def _demand(context: WorkerContext, job: Job) -> Demand:
    return requirements.demand(job, recomputes=context.device.recomputes)
