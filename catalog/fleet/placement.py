"""Where a job could run: how device groups of live workers hold its base model, and why workers accept no new jobs.

catalog/resources/sharding.py defines the rules; this module makes no decisions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from sqlalchemy.orm import Session

from catalog.fleet import views
from catalog.fleet.views import LoadedTrainer
from catalog.resources import requirements
from catalog.resources.pack_key import quantization_of
from catalog.resources.sharding import NEVER, Demand, DeviceGroup, reason
from catalog.tables.fleet import Worker
from catalog.tables.jobs import Job
from catalog.tables.storage import BaseModelRow
from catalog.tables.table import Json

REMEDY = "An operator can make one available again: lorry workers uncordon ID."


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


def accepting(residents: Sequence[LoadedTrainer]) -> list[LoadedTrainer]:
    return [resident for resident in residents if not resident.takes_nothing_new]


def closed_workers(residents: Sequence[LoadedTrainer]) -> list[Json]:
    """Return worker_id, and by and reason of the cordon if there is one, of each worker that accepts no new jobs."""
    closed = (resident for resident in residents if resident.takes_nothing_new)
    return [{"worker_id": one.worker_id, **_cordon_summary(one.cordon)} for one in closed]


def why_all_closed(residents: Sequence[LoadedTrainer]) -> str | None:
    """Return the reason why no job starts if every live worker rejects new jobs; None otherwise."""
    if not residents or accepting(residents):
        return None
    if len(residents) == 1:
        return f"{_sentence(residents[0])} It is the only running worker. {REMEDY}"
    shown = next((one for one in residents if one.cordon is not None), residents[0])
    none = f"None of the {len(residents)} running workers accepts new jobs: all are cordoned or draining."
    return f"{none} {_sentence(shown)} {REMEDY}"


def why_base_closed(residents: Sequence[LoadedTrainer], base_digest: str) -> str | None:
    """Return the reason why a job can't join a loaded trainer of its base model; None if there is no such trainer."""
    unavailable = [one for one in residents if one.takes_nothing_new and one.base_digest == base_digest]
    return (
        f"Its base model is also loaded on a worker that accepts no new jobs. {_sentence(unavailable[0])}"
        if unavailable
        else None
    )


def drain_or_cordon(worker: Worker | None) -> str | None:
    """Return a sentence about the drain or cordon of the worker that trains a job; None if there is neither."""
    if worker is None or worker.ended_at is not None:
        return None
    if worker.drain_requested:
        return "That worker is draining: the job saves a checkpoint and continues on another worker."
    return "That worker is cordoned: it finishes this job and accepts no new one." if worker.cordon else None


def _sentence(resident: LoadedTrainer) -> str:
    if resident.cordon is None:
        return f"Worker {resident.worker_id} is draining."
    reason = resident.cordon.get("reason")
    return f"Worker {resident.worker_id} is cordoned{f': {reason}' if reason else '.'}".rstrip(".") + "."


def _cordon_summary(cordon: Json | None) -> Json:
    return {} if cordon is None else {"by": cordon["by"], "reason": cordon["reason"]}
