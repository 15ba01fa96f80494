"""Of how many devices the jobs of a worker have their part: those of its group, and those that its gang lends it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from catalog.resources.sharding import group_told
from catalog.tables import Gang, GangSeat

Lent = Mapping[str, int]
"""By worker: devices of all members of the round that it leads, its own among them."""


def lent(session: Session) -> Lent:
    """Processes on a CPU share it: it is one device. Of workers that lead no round nothing is told."""
    number = func.sum(case((GangSeat.kind == "cuda", GangSeat.num_processes), else_=1))
    called = select(Gang.leader_id, number).join(GangSeat, GangSeat.round_id == Gang.round_id)
    rows = session.execute(called.where(Gang.leader_id.is_not(None)).group_by(Gang.leader_id))
    return {leader_id: int(total) for leader_id, total in rows if leader_id is not None}


def count(worker_id: str | None, devices: Sequence[Mapping[str, Any]] | None, lent_to: Lent) -> int:
    """devices: as on the worker's record; None where there is none any more. At least one. Pure."""
    if worker_id is not None and worker_id in lent_to:
        return lent_to[worker_id]
    group = group_told(devices or (), 0)
    return group.num_devices if group.kind == "cuda" else 1
