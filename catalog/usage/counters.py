"""Numbers of the whole fleet, kept in the transactions that change them: to read one costs the same however many jobs
there ever were.

What one transaction adds is written at its end, in one order and after what catalog/usage/ledger.py writes. So the
locks of shared rows are held for a moment only, and no deadlock is possible.
"""

from __future__ import annotations

import secrets
from collections import Counter
from typing import Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from catalog.db.database import add_all_to, at_the_end
from catalog.states import JobState, PriorityClass
from catalog.tables import Tally

SLOTS = 16
Name = Literal["jobs", "claims", "attempts_ended", "leases_expired", "trained_tokens", "adapters"]
Tallies = dict[tuple[str, str], int]
"""Numbers by name and label."""


def add(session: Session, name: Name, label: str = "", number: int = 1) -> None:
    """So many more, or fewer where it is below 0."""
    pending: Counter[tuple[str, str]] | None = session.info.get("tallies")
    if pending is None:
        pending = session.info["tallies"] = Counter[tuple[str, str]]()
        at_the_end(session, "tallies", _write)
    pending[name, label] += number


def moved(session: Session, priority: int, *, before: JobState | None, after: JobState) -> None:
    """A job of this class is in another state."""
    if before is not None:
        add(session, "jobs", label_of(before, priority), -1)
    add(session, "jobs", label_of(after, priority))


def label_of(state: str, priority: int) -> str:
    return f"{state} {priority}"


def jobs(tallies: Tallies) -> dict[tuple[JobState, PriorityClass], int]:
    """How many there are in each state and class; every pair is there."""
    return {
        (state, priority): tallies.get(("jobs", label_of(state, priority)), 0)
        for state in JobState
        for priority in PriorityClass
    }


def read(session: Session) -> Tallies:
    """Without what this transaction adds."""
    summed = select(Tally.name, Tally.label, func.sum(Tally.number)).group_by(Tally.name, Tally.label)
    return {(name, label): int(number) for name, label, number in session.execute(summed)}


def _write(session: Session) -> None:
    pending: Counter[tuple[str, str]] = session.info.pop("tallies", None) or Counter()
    changed = sorted((name, label, number) for (name, label), number in pending.items() if number)
    if not changed:
        return
    session.flush()  # all else is written before: a row of these is held for a moment only
    slot = secrets.randbelow(SLOTS)
    rows = [{"name": name, "label": label, "slot": slot, "number": number} for name, label, number in changed]
    add_all_to(session, Tally, ("name", "label", "slot"), ("number",), rows)
