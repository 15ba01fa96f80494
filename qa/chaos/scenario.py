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
    """A fault that is injected. `act` raises AssertionError where what must also be true is not, and says what it saw.
    When it returns every job has ended, or is about to."""

    name: str
    fault: str
    also: str
    act: Callable[[FaultSite], str]
    databases: tuple[DatabaseKind, ...] = DATABASES
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of the site's processes, beside what shortens the waiting."""
    has_redis: bool = False
    has_s3: bool = False
    """The store is a bucket; workers reach it through a proxy that can fail."""
    small_disk: str | None = None
    """A folder of the site's that is a file system of its own, to be filled. `database`: SQLite's file is there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NotHere:
    """A fault of the matrix that can't be injected on this machine."""

    name: str
    fault: str
    why: str
