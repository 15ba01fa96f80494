"""Leases: exclusive claims of a process on a row of a `Leased` table, for a limited time.

The process that acquires a row gets a new claim id (a fencing token) and passes it with every later write. If another
process has acquired the row since, `held` finds nothing, and the late process writes nothing. After a lease has
expired, other processes may acquire the row; until one does, the claim of its holder stays valid.
catalog/lifecycle/recovery.py releases expired claims on jobs.
"""

from __future__ import annotations

from typing import TypeVar

from sqlalchemy import ColumnElement, or_, select
from sqlalchemy.orm import Session

from catalog.db.database import Database, read_clock
from catalog.tables.table import Leased, new_id

LeasedT = TypeVar("LeasedT", bound=Leased)


def is_free(table: type[Leased], *, now: float) -> ColumnElement[bool]:
    """Return the condition that no process has a valid lease on the row. To acquire the row, also use `skip_locked`."""
    return or_(table.lease_expires_at.is_(None), table.lease_expires_at <= now)


def acquire(row: Leased, *, now: float, lease_seconds: float, prefix: str = "claim") -> str:
    """Lease a free row. The caller has locked it. Returns the claim id."""
    row.claim_id = claim_id = new_id(prefix)
    row.lease_expires_at = now + lease_seconds
    return claim_id


def held(session: Session, table: type[LeasedT], claim_id: str) -> LeasedT | None:
    """Return the row that the claim holds, locked until the transaction ends; None if the claim has lost it."""
    return session.scalar(select(table).where(table.claim_id == claim_id).with_for_update())


def renew(db: Database, table: type[Leased], claim_id: str, *, lease_seconds: float) -> bool:
    """Extend the lease. Returns False if the claim is stale: the row was released, deleted or acquired by another."""
    with db.write() as session:
        row = held(session, table, claim_id)
        if row is not None:
            row.lease_expires_at = read_clock(session) + lease_seconds
        return row is not None


def release(row: Leased) -> None:
    """Release a row. The caller has locked it."""
    row.claim_id = row.lease_expires_at = None
