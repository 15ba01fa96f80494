"""Lists where a job could run: how device groups of live workers hold its base model, and the memory per device.

catalog/resources/sharding.py defines the rules; this module makes no decisions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from sqlalchemy.orm import Session

from catalog.fleet import views
from catalog.resources import requirements
from catalog.resources.pack_key import quantization_of
from catalog.resources.sharding import NEVER, Demand, DeviceGroup, reason
from catalog.tables.fleet import Worker
from catalog.tables.jobs import Job
from catalog.tables.storage import BaseModelRow
from catalog.tables.table import Json


def of_running(session: Session, job: Job) -> list[Json]:
    """Return the placement of a running job; [] if its worker is no longer known."""
    worker = session.get(Worker, job.worker_id) if job.worker_id else None
    return [] if worker is None else [_placement(session, job, views.empty_capacity(worker).group)]


def of_waiting(session: Session, job: Job, *, now: float, lenders: Collection[str] = ()) -> list[Json]:
    """Return the possible placements of a queued job, one for each kind of device group.

    They cover workers that accept new jobs, support the job's quantization and have enough memory. lenders: gang
    members that claim no jobs themselves.
    """
    quantization = quantization_of(job.pack_key)
    capacities = views.empty_capacities(session, now=now, quantization=quantization, without=lenders)
    num_by_group = Counter(capacity.group for capacity in capacities)
    placements = [_placement(session, job, group, num_workers=number) for group, number in num_by_group.items()]
    return [one for one in placements if one["needed_bytes"] <= one["memory_bytes"]]


def _placement(session: Session, job: Job, group: DeviceGroup, *, num_workers: int = 1) -> Json:
    demand = requirements.demand(job, recomputes=group.kind == "cuda")
    needed_bytes = group.needed_bytes(demand)
    is_sharded = group.holding(demand) != "replicated" and needed_bytes != NEVER
    return {
        "kind": group.kind,
        "num_devices": group.num_devices,
        "num_workers": num_workers,
        "strategy": group.strategy(demand),
        "reason": reason(group, demand),
        "needed_bytes": needed_bytes,
        "memory_bytes": group.bytes_of_each,
        "blocks": _blocks(session, job, group, demand) if is_sharded else None,
    }


def _blocks(session: Session, job: Job, group: DeviceGroup, demand: Demand) -> Json:
    description = session.get_one(BaseModelRow, job.base_model).description or {}
    parts = group.block_parts(demand, group.holding(demand))
    return {
        "count": description.get("blocks", {}).get("count"),
        "bytes": demand.shardable_bytes,
        "share_bytes": group.share_bytes(demand),
        "gathered_bytes": parts["gathered_blocks"] + parts.get("coming_share", 0),
    }
