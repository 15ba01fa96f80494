"""What a job and a trainer of its base take of memory: reckoned once, when its files are prepared, and kept on its row.

The arithmetic is in memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, or_, select
from sqlalchemy.orm import Session

from catalog.db.database import Database
from catalog.resources import memory, sharding
from catalog.resources import pack_key as packing
from catalog.resources.sharding import Demand
from catalog.spec.methods import compares_with_start
from catalog.states import UNFINISHED_STATES, JobState
from catalog.tables.jobs import Job
from catalog.tables.storage import BaseModelRow
from catalog.tables.table import Json


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryRequirements:
    """In bytes."""

    own_bytes: int
    """What it takes wherever it trains, beside its part of a tick."""
    saved_bytes: int
    """What it does without of that on a device that computes blocks again."""
    trainer_bytes: int
    """What a trainer of its base needs before its first job."""
    slice_bytes: int
    """What it adds to a tick beside other jobs, where the tick has not reached its size."""
    shardable_bytes: int
    """What several devices can divide of what its trainer needs; 0 of a job that reads whole weights."""
    gathered_bytes: int
    """What each of them then needs beside its share."""


def note(session: Session, job: Job) -> None:
    """Keep on the job's row what it needs, once its longest example is known."""
    needs = of(session, job)
    job.own_bytes, job.saved_bytes = needs.own_bytes, needs.saved_bytes
    job.trainer_bytes, job.slice_bytes = needs.trainer_bytes, needs.slice_bytes
    job.shardable_bytes, job.gathered_bytes = needs.shardable_bytes, needs.gathered_bytes
    job.least_bytes = needs.trainer_bytes + needs.own_bytes - needs.saved_bytes
    job.least_divided_bytes = job.least_bytes - max(0, needs.shardable_bytes - needs.gathered_bytes)


def note_all(db: Database, *, batch: int = 500) -> int:
    """Of those in the queue since before needs were kept, in short transactions. Returns how many there were."""
    is_unknown = or_(Job.own_bytes.is_(None), Job.least_bytes == 0, Job.least_divided_bytes == 0)
    return _note_each(db, (Job.state == JobState.QUEUED, is_unknown), batch=batch)


def note_base(db: Database, name: str, *, batch: int = 500) -> int:
    """Of all on a base of which more is known now, in short transactions. Returns how many there were."""
    on_it = (Job.base_model == name, Job.state.in_(UNFINISHED_STATES), Job.own_bytes.is_not(None))
    return _note_each(db, on_it, batch=batch)


def _note_each(db: Database, wanted: tuple[ColumnElement[bool], ...], *, batch: int) -> int:
    with db.read() as session:
        ids = sorted(session.scalars(select(Job.id).where(*wanted)))
    for start in range(0, len(ids), batch):
        with db.write() as session:
            found = select(Job).where(Job.id.in_(ids[start : start + batch]), *wanted).order_by(Job.id)
            for job in session.scalars(found.with_for_update()):
                note(session, job)
                job.place = job.place or job.created_at
    return len(ids)


def of(session: Session, job: Job) -> MemoryRequirements:
    """As reckoned now."""
    description = session.get_one(BaseModelRow, job.base_model).description or {}
    precision, quantization = packing.precision_of(job.pack_key), packing.quantization_of(job.pack_key)
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
    """What devices can divide of its trainer's base, and what each then holds beside its share; 0 where the job needs
    whole weights."""
    quantization = packing.quantization_of(job.pack_key)
    if sharding.hindrance(job.spec["lora"], quantization, description) is not None:
        return 0, 0
    return sharding.block_bytes(description, packing.precision_of(job.pack_key))


def demand(job: Job, description: Json, *, recomputes: bool) -> Demand:
    """What it needs of a device with a trainer to itself, as its row has it. recomputes: the device. description: the
    base's, from which is reckoned what the row has not."""
    if job.own_bytes is None:
        precision, quantization = packing.precision_of(job.pack_key), packing.quantization_of(job.pack_key)
        whole = memory.trainer_bytes(description, precision, quantization)
        whole += own_bytes(job, description, recomputes=recomputes)
    else:
        whole = job.own_bytes - ((job.saved_bytes or 0) if recomputes else 0) + (job.trainer_bytes or 0)
    is_known = job.own_bytes is not None and job.least_divided_bytes > 0
    kept = job.shardable_bytes, job.gathered_bytes
    divisible, gathered = kept if is_known else shardable_bytes(job, description)
    return Demand(whole_bytes=whole, shardable_bytes=divisible, gathered_bytes=gathered)


def own_bytes(job: Job, description: Json, *, recomputes: bool = False) -> int:
    """What the job takes in its trainer, beside its part of a tick. description: the base's. recomputes: the device."""
    return sum(own_parts(job, description, recomputes=recomputes).values())


def own_parts(job: Job, description: Json, *, recomputes: bool = False) -> dict[str, int]:
    """The same by what it is for."""
    spec = job.spec
    lora = spec["lora"]
    return memory.own_parts(
        description,
        packing.precision_of(job.pack_key),
        num_parameters=job.adapter_parameters,
        dropout=float(lora.get("dropout") or 0),
        keeps_best=spec.get("keep") == "best",
        use_dora=bool(lora.get("use_dora")),
        init_lora_weights=lora.get("init_lora_weights"),
        batch_size=int(spec["batch_size"]),
        keeps_parent=job.parent_adapter is not None and compares_with_start(spec.get("method", "supervised")),
        longest_example=job.longest_example,
        samples=spec.get("samples"),
        optimizer=spec["optimizer"].get("type", "adamw"),
        lowest_rank=memory.lowest_rank(lora),
        recomputes=recomputes,
    )
