"""Gangs as people see them: who is there, and why jobs wait where all workers are of gangs that are not complete."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from catalog.tables import Gang, GangSeat, Json, Worker
from catalog.tables.living import SILENT_SECONDS


@dataclass(frozen=True, kw_only=True, slots=True)
class GangView:
    name: str
    leader_id: str | None
    size: int
    min_size: int
    workers: tuple[str, ...]
    """Those that live and take something new, or train."""
    has_trainer: bool
    """Those that are there have begun."""

    @property
    def is_short(self) -> bool:
        return len(self.workers) < self.size


def all_of(session: Session, *, now: float, silent_seconds: float = SILENT_SECONDS) -> list[GangView]:
    """Those of which anybody lives, by name."""
    live = (Worker.ended_at.is_(None), Worker.heartbeat_at > now - silent_seconds)
    found = select(Gang, GangSeat, Worker).join(GangSeat, GangSeat.gang == Gang.name)
    rows = session.execute(found.join(Worker, Worker.id == GangSeat.worker_id).where(*live).order_by(Worker.id)).all()
    there: dict[str, list[str]] = {row.Gang.name: [] for row in rows}
    for _, seat, worker in rows:
        if not (worker.takes_nothing_new or seat.is_leaving):
            there[seat.gang].append(worker.id)
    gangs = {row.Gang.name: row.Gang for row in rows}
    return [
        GangView(
            name=name,
            leader_id=gangs[name].leader_id,
            size=gangs[name].size,
            min_size=gangs[name].min_size,
            workers=tuple(there[name]),
            has_trainer=any(worker.trainer_id and worker.id == gangs[name].leader_id for _, _, worker in rows),
        )
        for name in sorted(gangs)
    ]


def lenders(found: Iterable[GangView]) -> set[str]:
    """Workers that claim nothing themselves: they lend their devices to another that lives."""
    return {worker for gang in found if gang.leader_id in gang.workers for worker in gang.workers} - {
        gang.leader_id for gang in found if gang.leader_id is not None
    }


def smallest(session: Session, *, now: float) -> dict[str, Worker]:
    """Of each worker of a gang that lives: whose memory decides what fits the gang. Of more than train together the
    smaller ones stand by, as far as may be known."""
    limits: dict[str, Worker] = {}
    for gang in all_of(session, now=now):
        rows = session.scalars(select(Worker).where(Worker.id.in_(gang.workers))).all()
        largest_first = sorted(rows, key=lambda row: (row.memory_bytes, row.id), reverse=True)[: gang.size]
        limits |= {row.id: largest_first[-1] for row in rows}
    return limits


def facts(found: Iterable[GangView]) -> list[Json]:
    return [asdict(gang) | {"workers": list(gang.workers)} for gang in found]


def where_all_wait(found: Sequence[GangView], open_ids: Collection[str]) -> str | None:
    """Why nothing begins, where every worker that takes jobs is of a gang that is not complete."""
    short = [gang for gang in found if gang.is_short and not gang.has_trainer]
    if not open_ids or not set(open_ids) <= {worker for gang in short for worker in gang.workers}:
        return None
    told = [_sentence(gang) for gang in short]
    return f"It waits for others of a gang of workers. {' '.join(told)}"


def _sentence(gang: GangView) -> str:
    num_there = len(gang.workers)
    told = f"Of {gang.name} {num_there} of the {gang.size} workers {'is' if num_there == 1 else 'are'} there"
    if num_there >= gang.min_size:
        return f"{told}; they begin without the others when these have been away for a while."
    return f"{told}."
