"""What an auditor says, and what he is told of that no table holds: answers, webhooks, and trainers that were seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

Invariant = Literal["I1", "I2", "I3", "I4", "I5", "I6", "I7", "I8"]
INVARIANTS: tuple[Invariant, ...] = get_args(Invariant)
SAYS: dict[Invariant, str] = {
    "I1": "each accepted job reaches one final state",
    "I2": "one completion, by the highest attempt",
    "I3": "at most one live trainer per job within a lease and 10 s",
    "I4": "every visible artifact verifies",
    "I5": "same Idempotency-Key, one job",
    "I6": "webhooks at least once, same id",
    "I7": "no process, file, lease or row leaked after two leases",
    "I8": "every transition audited",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that must not be."""

    invariant: Invariant
    subject: str
    """Id of what it is about."""
    sentence: str

    def __str__(self) -> str:
        return f"{self.invariant} {self.subject}: {self.sentence}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sighting:
    """A trainer's process that held a claim's files, from when to when it was seen to live, in seconds since 1970."""

    pid: int
    claim_id: str
    first_at: float
    last_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Hook:
    """A webhook that came."""

    event_id: str
    event_type: str
    job_id: str


@dataclass(kw_only=True, slots=True)
class Seen:
    """What was seen from outside. Whatever is empty is not held against the record."""

    submissions: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    """By Idempotency-Key, the ids of jobs that answers named."""
    hooks: Sequence[Hook] = ()
    trainers: Sequence[Sighting] = ()
