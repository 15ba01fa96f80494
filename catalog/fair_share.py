"""Whose turn it is: priority class, then fair share between projects, then age. Pure, and explains itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from catalog.spec import PriorityClass


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A queued job, as far as deciding needs it."""

    job_id: str
    project_id: str
    base_digest: str
    pack_key: str
    priority: int
    created_at: float
    own_bytes: int
    """What it takes wherever it trains: its row, and the mask of its dropout."""
    trainer_bytes: int
    """What a trainer of its base needs before its first job."""
    saved_bytes: int = 0
    """What it does without of that on a device that computes blocks again."""
    slice_bytes: int = 0
    """What it adds to a tick, beside other jobs, where the tick has not reached its size."""
    is_suspect: bool = False
    """One more bad end and it is quarantined: it trains alone, so that no packmate is blamed or hurt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A candidate's place in the queue, from 1, and why it has it."""

    candidate: Candidate
    position: int
    waited_seconds: float
    project_rank: int
    """Jobs of its project that run, and those that wait before it in its class."""
    reason: str


def order(
    candidates: Iterable[Candidate], now: float, *, running_by_project: Mapping[str, int] | None = None
) -> list[Turn]:
    """The queue, first turn first.

    Within a class, a project's n-th waiting job stands behind every other project's first n-1: what runs
    already counts, so a project with a hundred jobs takes turns with one that has two. Age decides the rest.
    """
    ranks = Counter(running_by_project or {})
    started = dict(ranks)
    ranked: list[tuple[int, int, float, str, Candidate]] = []
    seen: Counter[tuple[int, str]] = Counter()
    for candidate in sorted(candidates, key=lambda c: (c.priority, c.created_at, c.job_id)):
        group = (candidate.priority, candidate.project_id)
        rank = started.get(candidate.project_id, 0) + seen[group]
        seen[group] += 1
        ranked.append((candidate.priority, rank, candidate.created_at, candidate.job_id, candidate))
    ranked.sort(key=lambda row: row[:4])
    return [
        _turn(row[-1], position=i, rank=row[1], num_running=started.get(row[-1].project_id, 0), now=now)
        for i, row in enumerate(ranked, start=1)
    ]


def _turn(candidate: Candidate, *, position: int, rank: int, num_running: int, now: float) -> Turn:
    waited = max(0.0, now - candidate.created_at)
    name = PriorityClass(candidate.priority).name
    reason = f"priority {name}; {_of_its_project(num_running, rank - num_running)}; waited {waited:.0f} s"
    return Turn(candidate=candidate, position=position, waited_seconds=waited, project_rank=rank, reason=reason)


def _of_its_project(num_running: int, num_before: int) -> str:
    """Those that run are no longer in the queue: a job may be first in it and have many of them."""
    run = "run" if num_running != 1 else "runs"
    wait = "wait" if num_before != 1 else "waits"
    if num_running and num_before:
        return f"{num_running} of its project's jobs {run} and {num_before} of its class {wait} before it"
    if num_running:
        return f"{num_running} of its project's jobs {run}, none of its class waits before it"
    if num_before:
        return f"{num_before} of its project's jobs of its class {wait} before it"
    return "none of its project's jobs runs or, in its class, waits before it"
