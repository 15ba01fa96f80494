"""Simulates a day of a cluster in seconds: runs the scheduling rules over the jobs of a trace.

`python -m tools.simulation.simulator trace.csv`

The trace has one line per job: submitted_at (seconds), project, priority, base, seconds (of training, alone on one
device). The simulation calls the functions of the service, stores nothing and trains nothing. It reports waiting times
and device-seconds.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from catalog.resources import throughput
from catalog.resources.throughput import Speeds
from catalog.scheduling import ordering, preemption
from catalog.scheduling.ordering import order
from catalog.scheduling.packing import Choice, choose_anchor
from catalog.scheduling.preemption import Holder, Preemption, Training
from catalog.scheduling.scheduler import Join, Start, decide, ordered
from catalog.scheduling.snapshot import USUAL, Capacity, Policy, QueueSnapshot, Share, WorkerService
from catalog.states import PriorityClass
from tools.simulation.queue import Arrival, SimulatedQueue, SimulatedRun

PLENTY = 10**12
SPEEDS = Speeds(alone=((1024.0, 1.0),), together=((2048.0, 1.9), (4096.0, 3.4), (8192.0, 4.0)))
"""Tick speeds of a device with a plateau at four times the speed of a single job; see
catalog/resources/throughput.py."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """The simulated cluster."""

    num_workers: int = 8
    max_jobs: int = 16
    max_slowdown: float = 4.0
    load_seconds: float = 60.0
    """Time to load a base model that is not resident."""
    weights: Mapping[str, float] = field(default_factory=dict[str, float])
    policy: Policy = USUAL


@dataclass(kw_only=True, slots=True)
class _Worker:
    key: str | None = None
    jobs: dict[str, SimulatedRun] = field(default_factory=dict[str, SimulatedRun])
    as_of: float = 0.0
    """Time up to which the progress of its jobs is calculated; in the future while it loads a base model."""
    version: int = 0
    """Incremented when its jobs change, so that a completion event that was predicted earlier is ignored."""
    num_loads: int = 0


class Simulation:
    """A simulation of `arrivals` on `cluster`. Call `run` and read `records`."""

    def __init__(self, arrivals: Iterable[Arrival], cluster: Cluster) -> None:
        self.cluster = cluster
        self.now = 0.0
        self.records: list[SimulatedRun] = []
        self._numbers = count()
        self._events: list[tuple[float, int, Any, int]] = []
        for number, arrival in enumerate(sorted(arrivals, key=lambda each: each.at)):
            record = SimulatedRun(arrival=arrival, job_id=f"job-{number:07}", left=arrival.seconds)
            self.records.append(record)
            self._push(arrival.at, record)
        self._queue = SimulatedQueue()
        self._workers = [_Worker() for _ in range(cluster.num_workers)]
        self._used: dict[str, tuple[float, float]] = {}
        self._running: defaultdict[str, int] = defaultdict(int)
        self._served = WorkerService(at=(served_at := dict[tuple[str, int], float]()), memory_bytes=PLENTY)
        self._served_at = served_at

    def run(self, *, until: float = float("inf")) -> list[SimulatedRun]:
        """Simulate until every job has finished, or until the time `until`."""
        while self._events and self._events[0][0] <= until:
            self.now, _, target, version = heapq.heappop(self._events)
            if isinstance(target, SimulatedRun) and version:
                self._press(target)
            elif isinstance(target, SimulatedRun):
                target.waits_since = self.now
                self._queue.add(target)
                if target.arrival.priority == PriorityClass.urgent and self.cluster.policy.max_preemptions:
                    self._push(self.now + self.cluster.policy.preempt_after_seconds, target, 1)
                for worker in self._workers:
                    if not worker.jobs or worker.key == target.arrival.base:  # other workers can't take it yet
                        self._poll(worker)
            elif target.version == version:
                self._end(target)
        self.now = max(self.now, until) if self._events else self.now
        for worker in self._workers:
            self._advance(worker)
        return self.records

    @property
    def num_loads(self) -> int:
        return sum(worker.num_loads for worker in self._workers)

    def _push(self, at: float, target: SimulatedRun | _Worker, version: int = 0) -> None:
        heapq.heappush(self._events, (at, next(self._numbers), target, version))

    def _end(self, worker: _Worker) -> None:
        self._advance(worker)
        for record in [record for record in worker.jobs.values() if record.left <= 1e-6]:
            record.ended_at = self.now
            del worker.jobs[record.job_id]
            self._running[record.arrival.project] -= 1
        self._poll(worker)
        self._schedule_next(worker)

    def _press(self, record: SimulatedRun) -> None:
        """Preempt jobs for an urgent job that is still queued, and check again after `ask_again_seconds`."""
        if record not in self._queue:
            return
        policy = self.cluster.policy
        chosen = self._preemption(record)
        if chosen is not None and chosen.victims:
            record.preemption_requested_at = self.now
            worker = self._workers[int(chosen.worker_id)]
            self._advance(worker)
            for victim in chosen.victims:
                self._send_back(worker, worker.jobs[victim.job_id])
            self._poll(worker)
            self._schedule_next(worker)
        self._push(self.now + policy.ask_again_seconds, record, 1)

    def _preemption(self, record: SimulatedRun) -> Preemption | None:
        policy = self.cluster.policy
        firsts = list(self._queue.firsts(preemption.AT_ONCE, None, 0))
        if all(job.job_id != record.job_id for job in firsts):
            return None
        entries = order(firsts, self.now, shares=self._shares(), served=(self._served,), policy=policy)
        for entry, ahead in preemption.pressing(entries, now=self.now, policy=policy):
            if entry.candidate.job_id == record.job_id:
                holders = [self._holder(number, worker) for number, worker in enumerate(self._workers) if worker.jobs]
                return preemption.choose(entry, holders, ahead=ahead, now=self.now, policy=policy)
        return None

    def _send_back(self, worker: _Worker, record: SimulatedRun) -> None:
        del worker.jobs[record.job_id]
        self._running[record.arrival.project] -= 1
        record.num_preemptions += 1
        record.waits_since = self.now
        self._queue.add(record)

    def _holder(self, number: int, worker: _Worker) -> Holder:
        slower, policy = throughput.slowdown(len(worker.jobs), SPEEDS), self.cluster.policy
        num_jobs = Counter(record.arrival.project for record in worker.jobs.values())
        levels = {
            (project, priority): preemption.level_if_it_left(
                self._share(project), priority=priority, devices_left=number / len(worker.jobs), policy=policy
            )
            for project, number in num_jobs.items()
            for priority in PriorityClass
        }
        jobs = tuple(
            Training(
                job_id=record.job_id,
                claim_id=record.job_id,
                project_id=record.arrival.project,
                effective_priority=record.effective_priority,
                effective_level=levels[record.arrival.project, PriorityClass(record.arrival.priority)],
                own_bytes=1,
                began_at=record.began_at,
                num_packmates=len(worker.jobs),
                num_preemptions=record.num_preemptions,
                seconds_left=record.left * slower,
            )
            for record in worker.jobs.values()
        )
        return Holder(
            worker_id=str(number),
            pack_key=worker.key or "",
            service=self._served,
            jobs=jobs,
            memory_bytes_free=PLENTY,
            places=self._places(worker),
        )

    def _places(self, worker: _Worker) -> int:
        at_most = self.cluster.max_jobs - len(worker.jobs)
        return throughput.free_places(len(worker.jobs), SPEEDS, max_slowdown=self.cluster.max_slowdown, at_most=at_most)

    def _advance(self, worker: _Worker) -> None:
        """Train the worker's jobs until now, and charge them."""
        elapsed = self.now - worker.as_of
        if elapsed <= 0:
            return
        worker.as_of = self.now
        if not worker.jobs:
            return
        slower = throughput.slowdown(len(worker.jobs), SPEEDS)
        for record in worker.jobs.values():
            record.left -= elapsed / slower
            record.trained += elapsed / slower
            owed = ordering.charge(elapsed, num_devices=1, num_jobs=len(worker.jobs))
            record.device_seconds += owed
            owed *= self.cluster.policy.multiple(record.arrival.priority)
            self._used[record.arrival.project] = (self._decayed_usage(record.arrival.project) + owed, self.now)

    def _decayed_usage(self, project: str) -> float:
        amount, as_of = self._used.get(project, (0.0, self.now))
        return ordering.decay(amount, self.now - as_of, half_life_seconds=self.cluster.policy.half_life_seconds)

    def _schedule_next(self, worker: _Worker) -> None:
        """Schedule an event for the next completion on the worker, if nothing changes before."""
        worker.version += 1
        if worker.jobs:
            soonest = min(record.left for record in worker.jobs.values())
            at = max(worker.as_of, self.now) + max(0.0, soonest) * throughput.slowdown(len(worker.jobs), SPEEDS)
            self._push(at, worker, worker.version)

    def _poll(self, worker: _Worker) -> None:
        """Poll the queue as a worker does: claim the jobs that are chosen for its free capacity."""
        places = self._places(worker)
        if not places or not len(self._queue):
            return
        action = decide(self._snapshot(worker, places), self.cluster.policy).action
        if isinstance(action, Start | Join):
            self._take(worker, action.choices)

    def _snapshot(self, worker: _Worker, places: int) -> QueueSnapshot:
        capacity = Capacity(
            max_jobs=places, memory_bytes_free=PLENTY, resident_key=worker.key, num_jobs=len(worker.jobs)
        )
        live = worker.key if worker.jobs else None
        snapshot = QueueSnapshot(
            now=self.now,
            candidates=tuple(self._queue.firsts(places + 1 if live else 1, worker.key, places)),
            shares=self._shares(),
            served=(self._served,),
            capacity=capacity,
            live_key=live,
            worker_bytes=PLENTY,
        )
        policy = self.cluster.policy
        entries = ordered(snapshot, policy)
        lead = None if live else choose_anchor(entries, capacity, patience_seconds=policy.patience_seconds)
        if lead is None:
            return snapshot
        alike = self._queue.firsts(0, lead.entry.candidate.pack_key, places)
        return replace(snapshot, candidates=(*snapshot.candidates, *alike))

    def _shares(self) -> dict[str, Share]:
        return {project: self._share(project) for project in self._queue.projects()}

    def _share(self, project: str) -> Share:
        weight = self.cluster.weights.get(project, 1.0)
        return Share(weight=weight, device_seconds=self._decayed_usage(project), **self._in_use(project))

    def _in_use(self, project: str) -> dict[str, Any]:
        parts = [
            sum(record.arrival.project == project for record in worker.jobs.values()) / len(worker.jobs)
            for worker in self._workers
            if worker.jobs
        ]
        return {"num_running": self._running[project], "devices_in_use": sum(parts)}

    def _take(self, worker: _Worker, choices: Sequence[Choice]) -> None:
        chosen = [choice.entry.candidate for choice in choices]
        counted = {
            choice.entry.candidate.job_id: min(choice.entry.effective_priority, choice.entry.candidate.priority)
            for choice in choices
        }
        self._advance(worker)
        if worker.key != chosen[0].pack_key:
            worker.key, worker.num_loads = chosen[0].pack_key, worker.num_loads + 1
            worker.as_of = self.now + self.cluster.load_seconds
        for choice in choices:
            if choice.entry.is_first_of_class:
                job = choice.entry.candidate
                self._served_at[job.project_id, job.priority] = self.now
        for candidate in chosen:
            record = self._queue.take(candidate.job_id)
            record.started_at = self.now if record.started_at is None else record.started_at
            record.began_at, record.effective_priority = self.now, counted[candidate.job_id]
            worker.jobs[record.job_id] = record
            self._running[record.arrival.project] += 1
        self._schedule_next(worker)


def read_trace(lines: Iterable[str]) -> list[Arrival]:
    """Parse a trace. Raises ValueError with the number of the first invalid line."""
    arrivals: list[Arrival] = []
    for number, row in enumerate(csv.DictReader(lines), start=2):
        try:
            arrivals.append(
                Arrival(
                    at=_seconds(row["submitted_at"]),
                    project=row["project"],
                    priority=PriorityClass[row["priority"]],
                    base=row["base"],
                    seconds=_seconds(row["seconds"]),
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            wanted = "submitted_at,project,priority,base,seconds"
            raise ValueError(
                f"Line {number} of the trace is invalid: {error}. Expected: {wanted}, priority by name."
            ) from error
    return arrivals


def _seconds(text: str) -> float:
    """Parse a number of seconds. Raises ValueError."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise ValueError(f"{text} is not a number of seconds")
    return number


def _weight(text: str) -> float:
    """Parse a weight. Raises ValueError."""
    weight = float(text or "nan")
    if not 0 < weight < math.inf:
        raise ValueError(f"Invalid weight {text!r}. Pass a number above 0, for example --weight search=2.")
    return weight


def summary(simulation: Simulation) -> dict[str, Any]:
    """Return device-seconds and waiting times, by project and by class."""
    records = simulation.records
    total = sum(record.device_seconds for record in records)
    return {
        "seconds": simulation.now,
        "jobs": len(records),
        "ended": sum(record.ended_at is not None for record in records),
        "loads": simulation.num_loads,
        "preemptions": sum(record.num_preemptions for record in records),
        "busy": total / max(1e-9, simulation.now * simulation.cluster.num_workers),
        "projects": {name: _of(group, total) for name, group in _by(records, _project)},
        "classes": {name: _of(group, total) for name, group in _by(records, _class)},
    }


def _project(record: SimulatedRun) -> str:
    return record.arrival.project


def _class(record: SimulatedRun) -> str:
    return PriorityClass(record.arrival.priority).name


def _by(
    records: Iterable[SimulatedRun], name_of: Callable[[SimulatedRun], str]
) -> list[tuple[str, list[SimulatedRun]]]:
    groups: defaultdict[str, list[SimulatedRun]] = defaultdict(list)
    for record in records:
        groups[name_of(record)].append(record)
    return sorted(groups.items())


def _of(records: list[SimulatedRun], total: float) -> dict[str, Any]:
    waits = sorted(record.waited for record in records if record.started_at is not None)
    used = sum(record.device_seconds for record in records)
    return {
        "jobs": len(records),
        "device_seconds": round(used, 1),
        "part": round(used / total, 4) if total else None,
        "waited_median": round(waits[len(waits) // 2], 1) if waits else None,
        "waited_most": round(waits[-1], 1) if waits else None,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.simulation.simulator", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("trace", type=Path, help="CSV with the columns submitted_at,project,priority,base,seconds")
    parser.add_argument("--workers", type=int, default=8, help="number of workers with one device each (default: 8)")
    parser.add_argument("--load-seconds", type=float, default=60.0, help="time to load a base model (default: 60 s)")
    parser.add_argument("--weight", action="append", default=[], metavar="PROJECT=WEIGHT")
    parser.add_argument(
        "--max-preemptions", type=int, default=USUAL.max_preemptions, help="maximum per job; 0: no preemption"
    )
    parser.add_argument(
        "--until", type=float, default=float("inf"), help="simulated time in seconds (default: all jobs)"
    )
    given = parser.parse_args(argv)
    try:
        weights = {name: _weight(text) for name, _, text in (pair.partition("=") for pair in given.weight)}
        arrivals = read_trace(given.trace.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    policy = replace(USUAL, max_preemptions=given.max_preemptions)
    cluster = Cluster(num_workers=given.workers, load_seconds=given.load_seconds, weights=weights, policy=policy)
    simulation = Simulation(arrivals, cluster)
    simulation.run(until=given.until)
    print(json.dumps(summary(simulation), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
