"""The findings of an auditor, and observations that no table contains: responses, webhooks and running trainers."""

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
    """One violation of an invariant."""

    invariant: Invariant
    subject: str
    """The id of the object with the violation."""
    sentence: str

    def __str__(self) -> str:
        return f"{self.invariant} {self.subject}: {self.sentence}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sighting:
    """A process of a trainer that held a claim's files, with the time at which it was first and last seen, in seconds
    since 1970."""

    pid: int
    claim_id: str
    first_at: float
    last_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Hook:
    """A received webhook."""

    event_id: str
    event_type: str
    job_id: str


@dataclass(kw_only=True, slots=True)
class Seen:
    """Observations from outside. Empty fields are not compared with the database."""

    submissions: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    """By Idempotency-Key, the ids of the jobs in the responses."""
    hooks: Sequence[Hook] = ()
    trainers: Sequence[Sighting] = ()
