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
    """A project's own share as data; of the others whose jobs wait no more than how many there are and go first."""
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
        return f"{among}, none has had less of late for its weight than its own."
    have, go = ("has", "goes") if share["projects_ahead"] == 1 else ("have", "go")
    return f"{among}, {share['projects_ahead']} {have} had less of late for the weight given, and {go} first."
