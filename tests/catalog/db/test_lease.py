"""Leases: only one process at a time holds a row, and a stale holder changes nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select

from catalog.db import lease
from catalog.db.database import Database, read_clock, skip_locked
from catalog.tables.table import Table
from catalog.tables.tasks import Task
from tests.catalog.world import LEASE, Clock

pytestmark = pytest.mark.both_databases

NAMES = [f"b{number}" for number in range(6)]


@pytest.fixture(autouse=True)
def rows(db: Database) -> None:
    """Add free rows to a table that has leases."""
    with db.write() as session:
        session.add_all(Task(kind="plan", subject=name, run_after=0.0, num_attempts=0) for name in NAMES)


def take(db: Database, limit: int = 1) -> dict[str, str]:
    """Acquire up to `limit` free rows. Returns the claim id of each by name."""
    with db.write() as session:
        now = read_clock(session)
        free = select(Task).where(lease.is_free(Task, now=now)).order_by(Task.subject)
        found = session.scalars(skip_locked(free.limit(limit)))
        return {row.subject: lease.acquire(row, now=now, lease_seconds=LEASE) for row in found}


def write(db: Database, claim_id: str, run_after: float) -> bool:
    """Change the row under the fence and release it, as a holder does. Returns whether the claim was still valid."""
    with db.write() as session:
        row = lease.held(session, Task, claim_id)
        if row is not None:
            row.run_after = run_after
            lease.release(row)
        return row is not None


def run_after_of(db: Database, name: str) -> float:
    with db.read() as session:
        return session.get_one(Task, ("plan", name)).run_after


def test_racing_processes_acquire_different_rows(db: Database) -> None:
    with ThreadPoolExecutor(8) as pool:
        taken = [name for found in pool.map(lambda _: take(db), range(24)) for name in found]

    left = take(db, limit=len(NAMES))

    assert len(taken) == len(set(taken))
    assert sorted([*taken, *left]) == NAMES


def test_expired_lease_is_taken_over_and_its_old_holder_changes_nothing(db: Database, clock: Clock) -> None:
    late = take(db, limit=len(NAMES))["b0"]
    clock.advance(LEASE + 1)
    holder = take(db, limit=1)["b0"]

    assert not write(db, late, 1.0)
    assert not lease.renew(db, Task, late, lease_seconds=LEASE)
    assert write(db, holder, 2.0)
    assert run_after_of(db, "b0") == 2.0


def test_expired_lease_stays_valid_until_another_process_takes_it(db: Database, clock: Clock) -> None:
    claim_id = take(db)["b0"]
    clock.advance(2 * LEASE)

    assert lease.renew(db, Task, claim_id, lease_seconds=LEASE)

    assert "b0" not in take(db, limit=len(NAMES))
    assert write(db, claim_id, 2.0)


def test_renewed_lease_is_kept_until_its_new_expiry(db: Database, clock: Clock) -> None:
    claim_id = take(db, limit=len(NAMES))["b0"]
    clock.advance(LEASE - 1)
    assert lease.renew(db, Task, claim_id, lease_seconds=LEASE)

    clock.advance(LEASE - 1)
    assert "b0" not in take(db, limit=len(NAMES))

    clock.advance(2)
    assert list(take(db)) == ["b0"]


def test_released_row_is_free_at_once_and_its_claim_is_over(db: Database) -> None:
    claim_id = take(db, limit=len(NAMES))["b0"]
    assert take(db) == {}

    assert write(db, claim_id, 2.0)

    assert not lease.renew(db, Task, claim_id, lease_seconds=LEASE)
    assert not write(db, claim_id, 1.0)
    assert take(db)["b0"] != claim_id


def test_claim_ids_are_unique_in_every_table_that_has_leases() -> None:
    leased = [
        table for table in Table.metadata.sorted_tables if {"claim_id", "lease_expires_at"} <= set(table.c.keys())
    ]

    assert sorted(table.name for table in leased) == ["jobs", "tasks"]
    assert all(table.c.claim_id.unique for table in leased)
