"""Sizes of the API benchmarks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.api.service import DATABASES

TITLES = {"postgresql": "PostgreSQL", "sqlite": "SQLite"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiPlan:
    folder: Path
    databases: tuple[str, ...] = DATABASES
    repeats: int = 3
    seconds: float = 5.0
    """Duration of each run of a load."""
    connections: int = 16
    few_jobs: int = 10_000
    many_jobs: int = 1_000_000
    points_a_job: int = 50
    long_steps: int = 100_000
    looks: int = 25
    """Measurements of each page on each database."""

    @property
    def core(self) -> int | None:
        """The only core that the API server may use: the last one, since other processes start at the first."""
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        return cores[-1] if len(cores) > 1 else None

    def settings(self) -> dict[str, Any]:
        names = ("databases", "repeats", "seconds", "connections", "few_jobs", "many_jobs", "points_a_job")
        names += ("long_steps", "looks")
        return {name: getattr(self, name) for name in names} | {"api_core": self.core}


def quick(folder: Path, databases: tuple[str, ...]) -> ApiPlan:
    return ApiPlan(
        folder=folder,
        databases=databases,
        repeats=1,
        seconds=0.3,
        connections=2,
        few_jobs=20,
        many_jobs=60,
        points_a_job=5,
        long_steps=600,
        looks=2,
    )
