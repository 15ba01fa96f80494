"""Whose turn it is: priority class, then what each project has had for its weight, then waiting. It explains itself.

A class that waits rises: see `_promoted`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from catalog.scheduling.picture import USUAL, Candidate, Policy, Service, Share, Unprepared
from catalog.spec import PriorityClass

NUM_CLASSES = len(PriorityClass)


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A candidate's place in the queue, from 1, and why it has it."""

    candidate: Candidate
    position: int
    waited_seconds: float
    project_rank: int
    """Jobs of its project that run, and those that wait before it in its class."""
    counts_as: int
    """The class that it stands in: its own or, of the first of a class that has waited, a higher one, which may be
    above `urgent`."""
    is_first_of_class: bool
    """It is its class's turn where it is claimed; whoever is let in beside or before it takes none."""
    level: float
    """Of its project, with those of its jobs that go before: device-seconds for each unit of weight."""
    reason: str
    is_made_room_for: bool
    """Others leave so that it can train: nobody behind it takes what they leave."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ranked:
    job: Candidate
    share: Share
    num_before: int
    """Jobs of its project and class that go before it."""
    counts_as: int
    level: float
    is_first_of_class: bool = False

    @property
    def key(self) -> tuple[int, float, float, str]:
        return self.counts_as, self.level, self.job.queued_at, self.job.job_id


def order(
    candidates: Iterable[Candidate],
    now: float,
    *,
    shares: Mapping[str, Share] | None = None,
    served: Collection[Service] = (),
    policy: Policy = USUAL,
) -> list[Turn]:
    """The queue, first turn first. Of one project and class, jobs keep their places.

    Within a class the project goes first that has had the least for its weight. A job that runs or goes before
    counts in advance, so where nobody has had anything yet, projects take turns, however many jobs one brings.
    served: what workers have served; of these count, for a job, those that hold it.
    """
    ranked = sorted(_ranked(candidates, shares or {}, policy), key=lambda row: row.key)
    for priority in {row.job.priority for row in ranked}:
        of_class = [number for number, row in enumerate(ranked) if row.job.priority == priority]
        came = min(ranked[number].job.queued_at for number in of_class)
        first = ranked[of_class[0]]
        since = max(came, _last_turn(first.job, served, now))
        counts_as = _promoted(priority, now - since, policy)
        ranked[of_class[0]] = replace(first, counts_as=counts_as, is_first_of_class=True)
    ranked.sort(key=lambda row: row.key)
    return [_turn(row, position, now=now, policy=policy) for position, row in enumerate(ranked, start=1)]


def first_to_prepare(
    waiting: Collection[Unprepared], now: float, *, last_turns: Mapping[int, float], policy: Policy = USUAL
) -> tuple[Unprepared, bool]:
    """Whose files are prepared next, of the first of each project and class; and whether it is its class's turn.

    The highest class first; in it the project that had none prepared for the longest. A class that waits rises here
    as it does there. last_turns: of each class.
    """
    firsts: dict[int, Unprepared] = {}
    oldest: dict[int, float] = {}
    for one in sorted(waiting, key=_before_in_preparation):
        firsts.setdefault(one.priority, one)
        oldest[one.priority] = min(one.created_at, oldest.get(one.priority, one.created_at))

    def counts_as(one: Unprepared) -> int:
        since = max(oldest[one.priority], last_turns.get(one.priority, -math.inf))
        return _promoted(one.priority, now - since, policy) if one is firsts[one.priority] else one.priority

    first = min(waiting, key=lambda one: (counts_as(one), *_before_in_preparation(one)))
    return first, first is firsts[first.priority]


def _before_in_preparation(one: Unprepared) -> tuple[float, float, str]:
    return one.preparing_at, one.created_at, one.job_id


def most_before(priority: int, policy: Policy = USUAL) -> tuple[float, int]:
    """The bound on a class's waiting: (seconds, jobs). Once jobs of it have waited for so long without a turn on any
    worker that holds the first of them, no more jobs than these go before that one there: one of each other class.

    Which of its projects that is, their shares decide; docs/SCHEDULING.md has the bound of that.
    """
    return (priority + 1) * policy.promote_after_seconds, NUM_CLASSES - 1


def _ranked(candidates: Iterable[Candidate], shares: Mapping[str, Share], policy: Policy) -> Iterator[_Ranked]:
    seen: Counter[tuple[str, int]] = Counter()
    for job in sorted(candidates, key=lambda c: (c.place, c.job_id)):
        share, num_before = shares.get(job.project_id, Share()), seen[job.project_id, job.priority]
        seen[job.project_id, job.priority] += 1
        level = share.level(policy, num_before=num_before)
        yield _Ranked(job=job, share=share, num_before=num_before, counts_as=job.priority, level=level)


def _last_turn(job: Candidate, served: Collection[Service], now: float) -> float:
    """Of the job's class, on a worker that holds it. A clock that was set back leaves times that say nothing."""
    turns = (service.at.get(job.priority, -math.inf) for service in served if service.holds(job))
    return max((at for at in turns if at <= now), default=-math.inf)


def _promoted(priority: int, waited_seconds: float, policy: Policy) -> int:
    """What the first of a class counts as: a class higher for each `promote_after_seconds` since the oldest of the
    class came, or since the class had its turn.

    There is no highest class, so of two that have both risen, the one goes first that was served earlier. Only one
    job rises at a time: shares between projects stay what they are.
    """
    return priority - math.floor(max(0.0, waited_seconds) / policy.promote_after_seconds)


def _turn(row: _Ranked, position: int, *, now: float, policy: Policy) -> Turn:
    waited = max(0.0, now - row.job.queued_at)
    parts = (_class(row), _of_its_project(row.share.num_running, row.num_before), *_used(row.share))
    return Turn(
        candidate=row.job,
        position=position,
        waited_seconds=waited,
        project_rank=row.share.num_running + row.num_before,
        counts_as=row.counts_as,
        is_first_of_class=row.is_first_of_class,
        level=row.level,
        reason="; ".join((*parts, f"waited {waited:.0f} s")),
        is_made_room_for=policy.is_making_room(row.job.room_asked_at, now),
    )


def _class(row: _Ranked) -> str:
    name = f"priority {PriorityClass(row.job.priority).name}"
    if row.counts_as == row.job.priority:
        return name
    above = f"as if {PriorityClass(row.counts_as).name}" if row.counts_as >= 0 else "above urgent"
    return f"{name}, {above} for the waiting of its class"


def _used(share: Share) -> Iterator[str]:
    if share.device_seconds or share.weight != 1:
        yield f"its project has had {share.device_seconds:.0f} device-seconds of late, at weight {share.weight:g}"


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
