"""Weighted fair shares: what projects have had, decayed, against their weights.

A device-second is one second of one device; jobs that train together share each alike.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from catalog.scheduling.picture import Policy, Share


def decay(amount: float, age_seconds: float, *, half_life_seconds: float) -> float:
    """What is left of it. A clock that was set back takes nothing away and adds nothing."""
    return amount * 0.5 ** (max(0.0, age_seconds) / half_life_seconds)


def charge(elapsed_seconds: float, *, num_devices: int, num_jobs: int) -> float:
    """Device-seconds that one of `num_jobs` jobs of a trainer is charged."""
    return max(0.0, elapsed_seconds) * max(1, num_devices) / max(1, num_jobs)


def longest_wait(
    level: float, *, of_others: Collection[float], longest_job: float, num_devices: int, policy: Policy
) -> float:
    """Seconds that a project's class may wait for others of that class while all devices train these, at most.

    level: its own at first. of_others: the weights of those who wait or train. longest_job: in device-seconds.
    Whenever another's job starts, that one's level is no higher than the level that waits; so what all others have at
    the end is at most W · level + n · longest_job, decayed as the level is, and it is no less than what the devices
    gave, D · h / ln 2 · (1 - 2^(-t/h)). Both give t. Infinite where jobs are as long as half-lives.
    """
    full = num_devices * policy.half_life_seconds / math.log(2)
    spare = full - len(of_others) * longest_job
    if spare <= 0:
        return math.inf
    return policy.half_life_seconds * math.log2((full + sum(of_others) * level) / spare)


def described(shares: Mapping[str, Share], project_id: str, policy: Policy) -> dict[str, Any]:
    """One project's share as data, among all whose jobs wait."""
    mine = shares.get(project_id, Share())
    everybody = [*shares.values()] if project_id in shares else [*shares.values(), mine]
    used = sum(share.device_seconds for share in everybody)
    return {
        "weight": mine.weight,
        "due": round(mine.weight / sum(share.weight for share in everybody), 4),
        "device_seconds": round(mine.device_seconds, 1),
        "part_of_use": round(mine.device_seconds / used, 4) if used else None,
        "num_running": mine.num_running,
        "level": round(mine.level(policy), 1),
        "num_projects": len(everybody),
    }


def sentence(share: Mapping[str, Any]) -> str | None:
    """For who asks why a job waits; None where no other project's job waits."""
    if share["num_projects"] < 2:
        return None
    due = f"Of the {share['num_projects']} projects whose jobs wait, its own is due {share['due']:.0%} by weight"
    if share["part_of_use"] is None:
        return f"{due}; none of them has trained of late."
    return f"{due}, and has had {share['part_of_use']:.0%} of what they trained of late."
