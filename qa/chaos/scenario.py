"""A row of the fault matrix: a sentence, additional conditions, and the function that injects the fault."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from qa.chaos.service import FaultSite

DatabaseKind = Literal["sqlite", "postgresql"]
DATABASES: tuple[DatabaseKind, ...] = get_args(DatabaseKind)
SQLITE: tuple[DatabaseKind, ...] = ("sqlite",)
POSTGRESQL: tuple[DatabaseKind, ...] = ("postgresql",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A fault that is injected. `act` returns what it observed, and raises AssertionError if a condition of `also` is
    violated. When it returns, every job has finished or is about to finish."""

    name: str
    fault: str
    also: str
    act: Callable[[FaultSite], str]
    databases: tuple[DatabaseKind, ...] = DATABASES
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """Variables for the site's processes, in addition to those that shorten the waiting times."""
    has_redis: bool = False
    has_s3: bool = False
    """The store is a bucket, which workers reach through a proxy that can fail."""
    small_disk: str | None = None
    """A folder of the site that is a separate file system, so that it can be filled. `database` contains SQLite's
    file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NotHere:
    """A fault of the matrix that can't be injected on this machine."""

    name: str
    fault: str
    why: str
