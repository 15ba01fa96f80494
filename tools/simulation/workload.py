"""Generates the trace of the day in docs/internals/scheduling-bounds.md, for `tools.simulation.simulator`.

`python -m tools.simulation.workload > day.csv`

Five projects that submit more work than fits into the day, three classes, forty base models. The same seed generates
the same trace.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from catalog.states import PriorityClass
from tools.simulation.queue import Arrival

HOUR = 3600.0
NUM_BASES = 40
LENGTHS = (300.0, 5400.0)
"""Shortest and longest training time of a job that trains alone, in seconds."""
COLUMNS = ("submitted_at", "project", "priority", "base", "seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """Jobs of a project and class: `number` in each interval between the hours `since` and `until`."""

    project: str
    priority: PriorityClass
    number: int
    since: float = 0.0
    until: float = 24.0
    each: float = 1.0
    """Length of an interval, in hours."""
    num_bases: int = NUM_BASES


STREAMS = (
    Stream(project="research", priority=PriorityClass.normal, number=700, until=0.1, each=0.1, num_bases=3),
    Stream(project="product", priority=PriorityClass.normal, number=28),
    Stream(project="product", priority=PriorityClass.urgent, number=2),
    Stream(project="search", priority=PriorityClass.normal, number=14),
    Stream(project="support", priority=PriorityClass.batch, number=14),
    Stream(project="support", priority=PriorityClass.urgent, number=1),
    Stream(project="students", priority=PriorityClass.batch, number=500, since=1.0, until=2.0),
)


def day(seed: int = 1) -> list[Arrival]:
    """Return all submissions, in order of time."""
    chance = random.Random(seed)  # noqa: S311  (not a secret)
    return sorted((arrival for stream in STREAMS for arrival in _of(stream, chance)), key=lambda each: each.at)


def _of(stream: Stream, chance: random.Random) -> Iterator[Arrival]:
    popularity = [1 / (1 + number) for number in range(stream.num_bases)]
    for turn in range(round((stream.until - stream.since) / stream.each)):
        began = (stream.since + turn * stream.each) * HOUR
        for base in chance.choices(range(stream.num_bases), popularity, k=stream.number):
            yield Arrival(
                at=round(began + chance.uniform(0, stream.each * HOUR), 1),
                project=stream.project,
                priority=stream.priority,
                base=f"base-{base:02}",
                seconds=round(chance.uniform(*LENGTHS), 1),
            )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.simulation.workload", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(argv)
    lines = csv.writer(sys.stdout)
    lines.writerow(COLUMNS)
    for job in day(given.seed):
        lines.writerow((job.at, job.project, PriorityClass(job.priority).name, job.base, job.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
