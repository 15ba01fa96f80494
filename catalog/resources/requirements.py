"""Memory requirements of a job and of a trainer of its base model, stored on the job's row when its files are prepared.

The arithmetic is in memory.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from catalog.resources import sharding
from catalog.resources.memory import BaseModelMemory, JobMemory
from catalog.resources.pack_key import precision_of, quantization_of
from catalog.resources.sharding import Demand
from catalog.tables.jobs import Job
from catalog.tables.storage import BaseModelRow
from catalog.tables.table import Json


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryRequirements:
    """Memory requirements of a job, in bytes."""

    own_bytes: int
    """Memory of the job itself on any device, without its part of a tick."""
    saved_bytes: int
    """The part of `own_bytes` that activation recomputation saves."""
    trainer_bytes: int
    """Memory of a trainer of its base model before the first job."""
    slice_bytes: int
    """Memory that the job adds to a tick with other jobs, while the tick is below its maximum size."""
    shardable_bytes: int
    """The part of `trainer_bytes` that can be sharded across devices. 0: the job needs full weights on each device."""
    gathered_bytes: int
    """Memory that each device then needs for gathered blocks, in addition to its shard."""


def note(session: Session, job: Job) -> None:
    """Store the requirements on the job's row. The job's longest example must be known."""
    needs = of(session, job)
    job.own_bytes, job.saved_bytes = needs.own_bytes, needs.saved_bytes
    job.trainer_bytes, job.slice_bytes = needs.trainer_bytes, needs.slice_bytes
    job.shardable_bytes, job.gathered_bytes = needs.shardable_bytes, needs.gathered_bytes
    job.least_bytes = needs.trainer_bytes + needs.own_bytes - needs.saved_bytes
    job.least_divided_bytes = job.least_bytes - max(0, needs.shardable_bytes - needs.gathered_bytes)


def of(session: Session, job: Job) -> MemoryRequirements:
    """Return the requirements as calculated now."""
    base = base_memory(job, session.get_one(BaseModelRow, job.base_model).description or {})
    own = sum(own_parts(job, base).values())
    divisible, gathered = shardable_bytes(job, base.description)
    return MemoryRequirements(
        own_bytes=own,
        saved_bytes=own - sum(own_parts(job, base, recomputes=True).values()),
        trainer_bytes=base.trainer_bytes(),
        slice_bytes=base.slice_bytes(),
        shardable_bytes=divisible,
        gathered_bytes=gathered,
    )


def base_memory(job: Job, description: Json) -> BaseModelMemory:
    """Return the memory of the job's base model, before a trainer has it. `description`: of the base model."""
    return BaseModelMemory(description, precision_of(job.pack_key), quantization_of(job.pack_key))


def shardable_bytes(job: Job, description: Mapping[str, Any]) -> tuple[int, int]:
    """Return the bytes of its base model that can be sharded, and the bytes of gathered blocks on each device.

    Both are 0 if the job needs full weights.
    """
    quantization = quantization_of(job.pack_key)
    if sharding.hindrance(job.spec["lora"], quantization, description) is not None:
        return 0, 0
    return sharding.block_bytes(description, precision_of(job.pack_key))


def demand(job: Job, *, recomputes: bool) -> Demand:
    """Return what a job that has been queued needs on a device, alone in a trainer.

    `recomputes`: whether the device uses activation recomputation.
    """
    assert job.own_bytes is not None, "`note` was called before it was queued"
    assert job.saved_bytes is not None
    assert job.trainer_bytes is not None
    whole = job.own_bytes - (job.saved_bytes if recomputes else 0) + job.trainer_bytes
    return Demand(whole_bytes=whole, shardable_bytes=job.shardable_bytes, gathered_bytes=job.gathered_bytes)


def own_parts(job: Job, base: BaseModelMemory, *, recomputes: bool = False) -> dict[str, int]:
    """Return the bytes of the job itself in a trainer, without its part of a tick, by part; see `gpus.PARTS`.

    `recomputes`: whether the device uses activation recomputation.
    """
    facts = JobMemory.of_spec(
        job.spec,
        num_parameters=job.adapter_parameters,
        longest_example=job.longest_example,
        has_parent=job.parent_adapter is not None,
    )
    return facts.parts(base, recomputes=recomputes)
