"""The order of the queue. Projects take turns by what they have had for their weight; a project's own jobs go by class.

A project's jobs: class, then its own order; a class that waits rises, see `_promoted`. Between projects: the level, to
which a class adds or subtracts a bounded amount (`Policy.handicap`). So no choice of classes moves shares by more than
`shares.largest_loss`. Every turn explains itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from catalog.scheduling.snapshot import USUAL, Candidate, Policy, Share, Unprepared, WorkerService
from catalog.states import PriorityClass

NUM_CLASSES = len(PriorityClass)


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueEntry:
    """A candidate's place in the queue, from 1, and why it has it."""

    candidate: Candidate
    position: int
    waited_seconds: float
    project_rank: int
    """Jobs of its project that run, and those that wait before it."""
    effective_priority: int
    """The class in which it stands among its project's jobs: its own or, of the first of a class that has waited, a
    higher one, which may be above `urgent`."""
    is_first_of_class: bool
    """Where it is claimed, its class has had its turn in its project; jobs that are let in beside or before it take
    none."""
    level: float
    """Of its project, with those of its jobs that go before: device-seconds for each unit of weight."""
    effective_level: float
    """With what its class adds or subtracts: the lowest goes first."""
    reason: str
    awaits_preemption: bool
    """Others leave so that it can train: nobody behind it takes what they leave."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Standing:
    """A candidate within its project."""

    job: Candidate
    effective_priority: int
    num_before_in_class: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ranked:
    standing: _Standing
    share: Share
    num_before: int
    """Jobs of its project that go before it."""
    level: float
    effective_level: float

    @property
    def key(self) -> tuple[float, float, str]:
        return self.effective_level, self.standing.job.queued_at, self.standing.job.job_id


def order(
    candidates: Iterable[Candidate],
    now: float,
    *,
    shares: Mapping[str, Share] | None = None,
    served: Collection[WorkerService] = (),
    policy: Policy = USUAL,
) -> list[QueueEntry]:
    """The queue, first turn first.

    The project goes first that has had the least for its weight. A job that runs or goes before counts in advance, so
    where nobody has had anything yet, projects take turns, however many jobs one brings. Of one project and class,
    jobs keep their places. served: what workers have served; of these count, for a job, those that hold it.
    """
    by_project: defaultdict[str, list[Candidate]] = defaultdict(list)
    for job in candidates:
        by_project[job.project_id].append(job)
    ranked: list[_Ranked] = []
    for project_id, jobs in by_project.items():
        share = (shares or {}).get(project_id, Share())
        standing = of_project(jobs, now, served=served, policy=policy)
        ranked += _ranked(standing, share, policy)
    ranked.sort(key=lambda row: row.key)
    return [_queue_entry(row, position, now=now, policy=policy) for position, row in enumerate(ranked, start=1)]


def first_to_prepare(waiting: Collection[Unprepared], now: float, *, policy: Policy = USUAL) -> Unprepared:
    """Whose files are prepared next, of the first of each project and class.

    The project goes first that had none prepared for the longest, whatever the classes of its jobs are. Its own jobs
    go by class, and a class that waits rises here as it does there.
    """
    projects: defaultdict[str, dict[int, Unprepared]] = defaultdict(dict)
    for one in sorted(waiting, key=lambda one: (one.created_at, one.job_id)):
        projects[one.project_id].setdefault(one.priority, one)

    def within(one: Unprepared) -> tuple[int, int]:
        waited = now - max(one.created_at, one.class_prepared_at if one.class_prepared_at <= now else -math.inf)
        return _promoted(one.priority, waited, policy), -one.priority

    firsts = [min(classes.values(), key=within) for classes in projects.values()]
    return min(firsts, key=lambda one: (one.preparing_at, one.created_at, one.job_id))


def most_before(priority: int, policy: Policy = USUAL) -> tuple[float, int]:
    """The bound on a class's waiting within a project: (seconds, jobs). Once the project's jobs of it have waited for
    so long without a turn on any worker that holds the first of them, no more of its jobs than these go before that
    one there: one of each other class.

    When the project has its turns, its share decides: see `shares.longest_wait`.
    """
    return (priority + 1) * policy.priority_aging_seconds, NUM_CLASSES - 1


def of_project(
    jobs: Iterable[Candidate], now: float, *, served: Collection[WorkerService], policy: Policy
) -> list[_Standing]:
    """A project's own order: by class, of which the first job may have risen, and then by place."""
    classes: defaultdict[int, list[Candidate]] = defaultdict(list)
    for job in sorted(jobs, key=lambda job: (job.place, job.job_id)):
        classes[job.priority].append(job)
    found: list[_Standing] = []
    for priority, of_class in classes.items():
        since = max(min(job.queued_at for job in of_class), _last_served_at(of_class[0], served, now))
        risen = _promoted(priority, now - since, policy)
        found += (
            _Standing(job=job, effective_priority=priority if number else risen, num_before_in_class=number)
            for number, job in enumerate(of_class)
        )
    return sorted(found, key=_within_project)


def _within_project(standing: _Standing) -> tuple[int, int, float, str]:
    """Of those that count as one class, the one first that has waited longer, and then their seconds."""
    return standing.effective_priority, standing.num_before_in_class, standing.job.queued_at, standing.job.job_id


def _ranked(standing: Sequence[_Standing], share: Share, policy: Policy) -> Iterator[_Ranked]:
    """With the levels of each. That a class has risen gains a project nothing over others; but a job that has risen
    above a higher class takes the place of one of those."""
    highest = list(accumulate((each.job.priority for each in reversed(standing)), min))[::-1]
    for num_before, (each, priority) in enumerate(zip(standing, highest, strict=True)):
        level = share.level(policy, num_before=num_before)
        yield _Ranked(
            standing=each,
            share=share,
            num_before=num_before,
            level=level,
            effective_level=level + policy.handicap(priority),
        )


def _last_served_at(job: Candidate, served: Collection[WorkerService], now: float) -> float:
    """Of the job's class in its project, on a worker that holds it. A clock that was set back leaves times that say
    nothing."""
    group = job.project_id, job.priority
    times = (service.at[group] for service in served if group in service.at and service.holds(job))
    return max((at for at in times if at <= now), default=-math.inf)


def _promoted(priority: int, waited_seconds: float, policy: Policy) -> int:
    """What the first of a project's class counts as: a class higher for each `priority_aging_seconds` since the oldest
    of the class came, or since the class had its turn.

    There is no highest class, so of two that have both risen, the one goes first that was served earlier. Only one
    job rises at a time.
    """
    return priority - math.floor(max(0.0, waited_seconds) / policy.priority_aging_seconds)


def _queue_entry(row: _Ranked, position: int, *, now: float, policy: Policy) -> QueueEntry:
    job = row.standing.job
    waited = max(0.0, now - job.queued_at)
    parts = (_class(row.standing), _of_its_project(row.share.num_running, row.num_before), *_used(row.share))
    return QueueEntry(
        candidate=job,
        position=position,
        waited_seconds=waited,
        project_rank=row.share.num_running + row.num_before,
        effective_priority=row.standing.effective_priority,
        is_first_of_class=not row.standing.num_before_in_class,
        level=row.level,
        effective_level=row.effective_level,
        reason="; ".join((*parts, f"waited {waited:.0f} s")),
        awaits_preemption=policy.awaits_preemption(job.preemption_requested_at, now),
    )


def _class(standing: _Standing) -> str:
    name = f"priority {PriorityClass(standing.job.priority).name}"
    if standing.effective_priority == standing.job.priority:
        return name
    above = (
        f"as if {PriorityClass(standing.effective_priority).name}"
        if standing.effective_priority >= 0
        else "above urgent"
    )
    return f"{name}, {above} in its project because its class has waited"


def _used(share: Share) -> Iterator[str]:
    if share.device_seconds or share.weight != 1:
        yield f"its project was charged {share.device_seconds:.0f} device-seconds recently, at weight {share.weight:g}"


def _of_its_project(num_running: int, num_before: int) -> str:
    """Those that run are no longer in the queue: a job may be first in it and have many of them."""
    run = "run" if num_running != 1 else "runs"
    wait = "wait" if num_before != 1 else "waits"
    if num_running and num_before:
        return f"{num_running} of its project's jobs {run} and {num_before} {wait} before it"
    if num_running:
        return f"{num_running} of its project's jobs {run}, none waits before it"
    if num_before:
        return f"{num_before} of its project's jobs {wait} before it"
    return "none of its project's jobs runs or waits before it"


def decay(amount: float, age_seconds: float, *, half_life_seconds: float) -> float:
    """What is left of it. A clock that was set back takes nothing away and adds nothing."""
    return amount * 0.5 ** (max(0.0, age_seconds) / half_life_seconds)


def charge(elapsed_seconds: float, *, num_devices: int, num_jobs: int) -> float:
    """Device-seconds that one of `num_jobs` jobs of a trainer is charged."""
    return max(0.0, elapsed_seconds) * max(1, num_devices) / max(1, num_jobs)


def longest_wait(
    level: float,
    *,
    of_others: Collection[float],
    longest_job: float,
    num_devices: int,
    policy: Policy,
    jobs_per_device: int = 1,
) -> float:
    """The most seconds that a project waits while all devices train other projects' jobs, whatever their classes are.

    level: its own at first. of_others: the weights of the projects that wait or train. longest_job: in device-seconds.
    When a job of another project starts, that project's level is at most this one's plus `most_ahead`, so all others
    have W · (level + most ahead) + n · D · j · longest_job at the end, decayed as the level is; and no less than what
    the devices gave, D · h / ln 2 · (1 - 2^(-t/h)). Both give t. Infinite where jobs are as long as half-lives.
    """
    full = num_devices * policy.half_life_seconds / math.log(2)
    spare = full - len(of_others) * num_devices * jobs_per_device * longest_job
    if spare <= 0:
        return math.inf
    entitled = sum(of_others) * (level + max_usage_lead(policy))
    return policy.half_life_seconds * math.log2((full + entitled) / spare)


def largest_loss(
    weight: float,
    *,
    of_others: Collection[float],
    longest_job: float,
    num_devices: int,
    seconds: float,
    policy: Policy,
    jobs_per_device: int = 1,
) -> float:
    """The most device-seconds by which a project that always has jobs waiting stays below its share of a window.

    The window begins at equal levels and lasts `seconds`; the devices are busy; every job fits every device. The bound
    holds whatever classes, number and times of jobs the other projects choose, as long as the project itself submits
    nothing `urgent`. At any time another project of weight w has had, decayed, at most w · (own level + `most_ahead` +
    advance · D / own weight) + D · j · longest_job: its last job started below that level, and those that train then
    go on to their end. The last factor turns the decayed sum into the plain one.
    """
    held = num_devices * policy.advance_seconds / weight
    running = len(of_others) * num_devices * jobs_per_device * longest_job
    excess = sum(of_others) * (max_usage_lead(policy) + held) + running
    undecayed = 1 + seconds * math.log(2) / policy.half_life_seconds
    return weight / (weight + sum(of_others)) * excess * undecayed


def max_usage_lead(policy: Policy) -> float:
    """The most by which the level of a project may exceed another's, and its jobs still go first by their class."""
    return policy.handicap(max(PriorityClass)) - policy.handicap(min(PriorityClass))


def describe_share(shares: Mapping[str, Share], project_id: str, policy: Policy) -> dict[str, Any]:
    """A project's own share as data; of the others whose jobs wait only how many there are, and how many have a lower
    level."""
    mine = shares.get(project_id, Share())
    others = [share for name, share in shares.items() if name != project_id]
    level = mine.level(policy)
    return {
        "weight": mine.weight,
        "device_seconds": round(mine.device_seconds, 1),
        "num_running": mine.num_running,
        "devices_in_use": round(mine.devices_in_use, 4),
        "normalized_usage": round(level, 1),
        "num_projects": 1 + len(others),
        "projects_ahead": sum(share.level(policy) < level for share in others),
    }


def all_shares(shares: Mapping[str, Share], policy: Policy) -> list[dict[str, Any]]:
    """For an operator: the share of each project whose jobs wait, and what it is due of all, the lowest level first."""
    weights = sum(share.weight for share in shares.values())
    used = sum(share.device_seconds for share in shares.values())
    rows = [
        {
            "project_id": project_id,
            **describe_share(shares, project_id, policy),
            "fair_share": round(share.weight / weights, 4),
            "usage_fraction": round(share.device_seconds / used, 4) if used else None,
        }
        for project_id, share in shares.items()
    ]
    return sorted(rows, key=lambda row: (row["normalized_usage"], row["project_id"]))


def share_sentence(share: Mapping[str, Any]) -> str | None:
    """For who asks why a job waits; None where no other project's job waits."""
    if share["num_projects"] < 2:
        return None
    among = f"Of the {share['num_projects']} projects whose jobs wait"
    if not share["projects_ahead"]:
        return f"{among}, none was charged less for its weight recently."
    were = "was" if share["projects_ahead"] == 1 else "were"
    return f"{among}, {share['projects_ahead']} {were} charged less for the weight recently."
