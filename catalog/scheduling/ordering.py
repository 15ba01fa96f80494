"""The order of the queue: fair share between projects, priority classes within a project.

The jobs of a project are ordered by class and then by position; priority aging promotes a class that waits (see
`_promoted`). Projects are ordered by normalized usage (`level`), to which a class adds or subtracts a bounded amount
(`Policy.handicap`). The choice of classes can therefore change fair shares by a bounded amount only; see
docs/explanation/scheduling.md. Each entry explains its position.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from catalog.scheduling.snapshot import USUAL, Candidate, Policy, Share, WorkerService
from catalog.states import PriorityClass


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueEntry:
    """A candidate's position in the queue, from 1, and the reason for it."""

    candidate: Candidate
    position: int
    waited_seconds: float
    effective_priority: int
    """Its class among its project's jobs. Priority aging can promote the first job of a class, even above `urgent`."""
    is_first_of_class: bool
    """A claim of this job counts as service of its class in its project. Claims of other jobs of the class do not."""
    level: float
    """Normalized usage of its project, including its jobs that are ahead: device-seconds per unit of weight."""
    effective_level: float
    """`level` plus the handicap of its class. The lowest is first."""
    reason: str
    awaits_preemption: bool
    """Whether jobs are being preempted for it. No job behind it may take the memory that they free."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Standing:
    """A candidate among the jobs of its project."""

    job: Candidate
    effective_priority: int
    num_before_in_class: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ranked:
    standing: _Standing
    share: Share
    num_before: int
    """Jobs of its project that are ahead of it."""
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
    """Return the queue in order.

    The project with the lowest normalized usage is first. Jobs that run or are ahead count in advance, so projects
    without usage alternate, however many jobs each submits. Jobs of one project and class keep their positions.
    `served`: the service of each worker; for a job, only workers that can hold it count.
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


def of_project(
    jobs: Iterable[Candidate], now: float, *, served: Collection[WorkerService], policy: Policy
) -> list[_Standing]:
    """Return the order within a project: by class, with priority aging of the first job of a class, then by `place`."""
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
    """Sort key within a project. First jobs of a class are ahead of further ones; then the waiting time decides."""
    return standing.effective_priority, standing.num_before_in_class, standing.job.queued_at, standing.job.job_id


def _ranked(standing: Sequence[_Standing], share: Share, policy: Policy) -> Iterator[_Ranked]:
    """Yield the jobs of a project with their levels.

    Priority aging gives a project no advantage over other projects: the job at each position has the highest original
    class among itself and the jobs behind it.
    """
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
    """Return when the job's class in its project was last served by a worker that can hold the job.

    Times in the future are ignored: the clock was set back after them.
    """
    group = job.project_id, job.priority
    times = (service.at[group] for service in served if group in service.at and service.holds(job))
    return max((at for at in times if at <= now), default=-math.inf)


def _promoted(priority: int, waited_seconds: float, policy: Policy) -> int:
    """Return the effective class of the first job of a class in a project (priority aging).

    It is one class higher for each `priority_aging_seconds` since the class was last served, or since its oldest job
    was queued. There is no highest class, so of two promoted classes the one that was served earlier is first. Only one
    job of a class is promoted at a time.
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
        f"promoted to {PriorityClass(standing.effective_priority).name}"
        if standing.effective_priority >= 0
        else "promoted above urgent"
    )
    return f"{name}, {above} within its project by priority aging"


def _used(share: Share) -> Iterator[str]:
    if share.device_seconds or share.weight != 1:
        yield f"its project was charged {share.device_seconds:.0f} device-seconds recently, at weight {share.weight:g}"


def _of_its_project(num_running: int, num_before: int) -> str:
    """Running jobs are no longer in the queue, so the first job in the queue may have many of them before it."""
    run = "run" if num_running != 1 else "runs"
    wait = "wait" if num_before != 1 else "waits"
    if num_running and num_before:
        return f"{num_running} of its project's jobs {run} and {num_before} {wait} before it"
    if num_running:
        return f"{num_running} of its project's jobs {run}, no other waits before it"
    if num_before:
        return f"{num_before} of its project's jobs {wait} before it"
    return "no other job of its project runs or waits before it"


def decay(amount: float, age_seconds: float, *, half_life_seconds: float) -> float:
    """Return the amount after exponential decay. A negative age, after the clock was set back, changes nothing."""
    return amount * 0.5 ** (max(0.0, age_seconds) / half_life_seconds)


def charge(elapsed_seconds: float, *, num_devices: int, num_jobs: int) -> float:
    """Return the device-seconds that are charged for one of the `num_jobs` jobs of a trainer."""
    return max(0.0, elapsed_seconds) * max(1, num_devices) / max(1, num_jobs)


def describe_share(shares: Mapping[str, Share], project_id: str, policy: Policy) -> dict[str, Any]:
    """Return a project's share as data.

    Of the other projects with queued jobs it contains only their number, and how many have a lower normalized usage.
    """
    own_share = shares.get(project_id, Share())
    others = [share for name, share in shares.items() if name != project_id]
    level = own_share.level(policy)
    return {
        "weight": own_share.weight,
        "device_seconds": round(own_share.device_seconds, 1),
        "num_running": own_share.num_running,
        "devices_in_use": round(own_share.devices_in_use, 4),
        "normalized_usage": round(level, 1),
        "num_projects": 1 + len(others),
        "projects_ahead": sum(share.level(policy) < level for share in others),
    }


def all_shares(shares: Mapping[str, Share], policy: Policy) -> list[dict[str, Any]]:
    """Return the share of each project with queued jobs, lowest normalized usage first. For operators only."""
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
    """Return a sentence about the share for explanations; None if no other project has queued jobs."""
    if share["num_projects"] < 2:
        return None
    among = f"{share['num_projects']} projects have queued jobs"
    if not share["projects_ahead"]:
        return f"{among}. None has less recent usage, relative to its weight."
    have = "has" if share["projects_ahead"] == 1 else "have"
    return f"{among}. {share['projects_ahead']} of them {have} less recent usage, relative to weight."
