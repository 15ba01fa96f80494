"""Memory requirements of a job and of a trainer of its base model, stored on the job's row when its files are prepared.

The arithmetic is in memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.orm import Session

from catalog.resources import memory, sharding
from catalog.resources.memory import ElementwiseKernels
from catalog.resources.pack_key import precision_of, quantization_of
from catalog.resources.sharding import Demand
from catalog.spec.methods import compares_with_start
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
    description = session.get_one(BaseModelRow, job.base_model).description or {}
    precision, quantization = precision_of(job.pack_key), quantization_of(job.pack_key)
    own = own_bytes(job, description)
    divisible, gathered = shardable_bytes(job, description)
    return MemoryRequirements(
        own_bytes=own,
        saved_bytes=own - own_bytes(job, description, recomputes=True),
        trainer_bytes=memory.trainer_bytes(description, precision, quantization),
        slice_bytes=memory.slice_bytes(description, precision),
        shardable_bytes=divisible,
        gathered_bytes=gathered,
    )


def shardable_bytes(job: Job, description: Json) -> tuple[int, int]:
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


def own_bytes(
    job: Job, description: Json, *, recomputes: bool = False, kernels: ElementwiseKernels | None = None
) -> int:
    """Return the bytes of the job itself in its trainer, without its part of a tick.

    `description`: of the base model. `recomputes`: whether the device uses activation recomputation. `kernels`: those
    of the trainer, if there is one.
    """
    return sum(own_parts(job, description, recomputes=recomputes, kernels=kernels).values())


def own_parts(
    job: Job, description: Json, *, recomputes: bool = False, kernels: ElementwiseKernels | None = None
) -> dict[str, int]:
    """Return `own_bytes` by part; see `gpus.PARTS`."""
    spec = job.spec
    lora = spec["lora"]
    return memory.own_parts(
        description,
        precision_of(job.pack_key),
        num_parameters=job.adapter_parameters,
        dropout=float(lora.get("dropout") or 0),
        keeps_best=spec["evaluation"]["keep"] == "best",
        use_dora=bool(lora.get("use_dora")),
        init_lora_weights=lora.get("init_lora_weights"),
        batch_size=int(spec["batch_size"]),
        keeps_parent=job.parent_adapter is not None and compares_with_start(spec.get("method", "supervised")),
        longest_example=job.longest_example,
        samples=spec["evaluation"]["samples"],
        optimizer=spec["optimizer"].get("type", "adamw"),
        lowest_rank=memory.lowest_rank(lora),
        highest_rank=memory.highest_rank(lora),
        slice_tokens=int(spec.get("slice_tokens") or memory.SLICE_TOKENS["cpu"]),
        recomputes=recomputes,
        kernels=kernels,
    )
