"""The queue of a simulation: jobs that wait, as the database would give them to a decision."""

from __future__ import annotations

from bisect import insort
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from catalog.scheduling.snapshot import Candidate


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """A job that comes into the queue."""

    at: float
    project: str
    priority: int
    base: str
    seconds: float
    """That it trains by itself."""


@dataclass(kw_only=True, slots=True)
class SimulatedRun:
    """How it went for one job."""

    arrival: Arrival
    job_id: str
    left: float
    """Seconds of training by itself that are still to do."""
    started_at: float | None = None
    ended_at: float | None = None
    device_seconds: float = 0.0
    began_at: float = 0.0
    """Of the attempt that runs, or ran last."""
    effective_priority: int = 0
    """The class in which it was let in then."""
    trained: float = 0.0
    """Seconds of training by itself that it has done, over all attempts."""
    num_preemptions: int = 0
    waits_since: float = 0.0
    """When it last came into the queue."""
    preemption_requested_at: float | None = None
    """When others were last asked to leave so that it can train."""

    @property
    def waited(self) -> float:
        return (self.started_at or 0.0) - self.arrival.at


class SimulatedQueue:
    """The first of each project and class, and of each kind, as the database gives them."""

    def __init__(self) -> None:
        self._waiting: dict[str, SimulatedRun] = {}
        self._groups: defaultdict[tuple[str, int], deque[SimulatedRun]] = defaultdict(deque)
        self._alike: defaultdict[tuple[str, str, int], deque[SimulatedRun]] = defaultdict(deque)
        self._keys: defaultdict[str, set[tuple[str, str, int]]] = defaultdict(set)

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, record: SimulatedRun) -> None:
        arrival = record.arrival
        self._waiting[record.job_id] = record
        alike = (arrival.base, arrival.project, arrival.priority)
        for group in (self._groups[arrival.project, arrival.priority], self._alike[alike]):
            if record.num_preemptions == 0:
                group.append(record)
            elif record not in group:  # back to its place
                insort(group, record, key=lambda each: (each.arrival.at, each.job_id))
        self._keys[arrival.base].add(alike)

    def take(self, job_id: str) -> SimulatedRun:
        return self._waiting.pop(job_id)

    def __contains__(self, record: SimulatedRun) -> bool:
        return record.job_id in self._waiting

    def projects(self) -> set[str]:
        return {project for (project, _), group in self._groups.items() if self._first(group, 1)}

    def firsts(self, per_group: int, key: str | None, per_key: int) -> Iterator[Candidate]:
        """Of each project and class so many, and so many of that kind."""
        found = [self._first(group, per_group) for group in self._groups.values()]
        found += [self._first(self._alike[alike], per_key) for alike in self._keys.get(key or "", ())]
        return (as_candidate(record) for records in found for record in records)

    def _first(self, group: deque[SimulatedRun], number: int) -> list[SimulatedRun]:
        while group and group[0].job_id not in self._waiting:
            group.popleft()
        return list(islice((record for record in group if record.job_id in self._waiting), number))


def as_candidate(record: SimulatedRun) -> Candidate:
    arrival = record.arrival
    return Candidate(
        job_id=record.job_id,
        project_id=arrival.project,
        base_digest=arrival.base,
        pack_key=arrival.base,
        priority=arrival.priority,
        place=arrival.at,
        queued_at=record.waits_since,
        own_bytes=1,
        trainer_bytes=1,
        preemption_requested_at=record.preemption_requested_at,
    )
