"""The queue of a simulation: queued jobs, as the database would return them for a decision."""

from __future__ import annotations

from bisect import insort
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from catalog.scheduling.snapshot import Candidate


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """The submission of a job."""

    at: float
    project: str
    priority: int
    base: str
    seconds: float
    """Training time of the job if it trains alone."""


@dataclass(kw_only=True, slots=True)
class SimulatedRun:
    """The state and the measurements of one job."""

    arrival: Arrival
    job_id: str
    left: float
    """Remaining seconds of training, if the job trains alone."""
    started_at: float | None = None
    ended_at: float | None = None
    device_seconds: float = 0.0
    began_at: float = 0.0
    """Start of the current or last attempt."""
    effective_priority: int = 0
    """The class with which that attempt started."""
    trained: float = 0.0
    """Completed training over all attempts, in seconds of a job that trains alone."""
    num_preemptions: int = 0
    waits_since: float = 0.0
    """When it last entered the queue."""
    preemption_requested_at: float | None = None
    """When other jobs were last preempted for it."""

    @property
    def waited(self) -> float:
        return (self.started_at or 0.0) - self.arrival.at


class SimulatedQueue:
    """Returns the first jobs of each project and class, and of each pack key, as the database does."""

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
            elif record not in group:  # a preempted job returns to its position
                insort(group, record, key=lambda each: (each.arrival.at, each.job_id))
        self._keys[arrival.base].add(alike)

    def take(self, job_id: str) -> SimulatedRun:
        return self._waiting.pop(job_id)

    def __contains__(self, record: SimulatedRun) -> bool:
        return record.job_id in self._waiting

    def projects(self) -> set[str]:
        return {project for (project, _), group in self._groups.items() if self._first(group, 1)}

    def firsts(self, per_group: int, key: str | None, per_key: int) -> Iterator[Candidate]:
        """Yield the first `per_group` jobs of each project and class, and `per_key` of each with the pack key `key`."""
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
