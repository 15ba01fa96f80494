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
    row_bytes: int
    trainer_bytes: int
    """What a trainer of its base needs before its first job."""
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
    """Jobs of its project that run or stand before it in its class."""
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
    return [_turn(row[-1], position=i, rank=row[1], now=now) for i, row in enumerate(ranked, start=1)]


def _turn(candidate: Candidate, *, position: int, rank: int, now: float) -> Turn:
    waited = max(0.0, now - candidate.created_at)
    name = PriorityClass(candidate.priority).name
    others = "none of its project's jobs" if rank == 0 else f"{rank} of its project's jobs"
    reason = f"priority {name}; {others} before it; waited {waited:.0f} s"
    return Turn(candidate=candidate, position=position, waited_seconds=waited, project_rank=rank, reason=reason)
