"""Weighted fair shares: what projects have had, decayed, against their weights.

A device-second is one second of one device; jobs that train together share each alike.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from catalog.scheduling.snapshot import Policy, Share
from catalog.states import PriorityClass


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
    entitled = sum(of_others) * (level + most_ahead(policy))
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
    excess = sum(of_others) * (most_ahead(policy) + held) + running
    undecayed = 1 + seconds * math.log(2) / policy.half_life_seconds
    return weight / (weight + sum(of_others)) * excess * undecayed


def most_ahead(policy: Policy) -> float:
    """The most by which the level of a project may exceed another's, and its jobs still go first by their class."""
    return policy.handicap(max(PriorityClass)) - policy.handicap(min(PriorityClass))


def described(shares: Mapping[str, Share], project_id: str, policy: Policy) -> dict[str, Any]:
    """A project's own share as data; of the others whose jobs wait only how many there are, and how many have a lower
    level."""
    mine = shares.get(project_id, Share())
    others = [share for name, share in shares.items() if name != project_id]
    level = mine.level(policy)
    return {
        "weight": mine.weight,
        "device_seconds": round(mine.device_seconds, 1),
        "num_running": mine.num_running,
        "devices_held": round(mine.devices_held, 4),
        "level": round(level, 1),
        "num_projects": 1 + len(others),
        "projects_ahead": sum(share.level(policy) < level for share in others),
    }


def of_everybody(shares: Mapping[str, Share], policy: Policy) -> list[dict[str, Any]]:
    """For an operator: the share of each project whose jobs wait, and what it is due of all, the lowest level first."""
    weights = sum(share.weight for share in shares.values())
    used = sum(share.device_seconds for share in shares.values())
    rows = [
        {
            "project_id": project_id,
            **described(shares, project_id, policy),
            "due": round(share.weight / weights, 4),
            "part_of_use": round(share.device_seconds / used, 4) if used else None,
        }
        for project_id, share in shares.items()
    ]
    return sorted(rows, key=lambda row: (row["level"], row["project_id"]))


def sentence(share: Mapping[str, Any]) -> str | None:
    """For who asks why a job waits; None where no other project's job waits."""
    if share["num_projects"] < 2:
        return None
    among = f"Of the {share['num_projects']} projects whose jobs wait"
    if not share["projects_ahead"]:
        return f"{among}, none was charged less for its weight recently."
    were = "was" if share["projects_ahead"] == 1 else "were"
    return f"{among}, {share['projects_ahead']} {were} charged less for the weight recently."
