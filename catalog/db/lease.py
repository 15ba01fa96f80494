"""Leases: a row of a `Leased` table belongs to one process for a while. catalog/lifecycle/recovery.py frees jobs.

The process that acquires a row gets a claim id, which was never used before, and names it in every later write. If
another process has taken the row since, `held` finds nothing, and the late process writes nothing. A lease that has
expired frees the row for others, but its holder keeps the row until one of them takes it.
"""

from __future__ import annotations

from typing import TypeVar

from sqlalchemy import ColumnElement, or_, select
from sqlalchemy.orm import Session

from catalog.db.database import Database, read_clock
from catalog.tables.table import Leased, new_id

LeasedT = TypeVar("LeasedT", bound=Leased)


def is_free(table: type[Leased], *, now: float) -> ColumnElement[bool]:
    """In a query: no process has a valid lease on the row. Whoever wants to acquire it uses `skip_locked` as well."""
    return or_(table.lease_expires_at.is_(None), table.lease_expires_at <= now)


def acquire(row: Leased, *, now: float, lease_seconds: float, prefix: str = "claim") -> str:
    """Lease a free row, which is locked. Returns the claim id."""
    row.claim_id = claim_id = new_id(prefix)
    row.lease_expires_at = now + lease_seconds
    return claim_id


def held(session: Session, table: type[LeasedT], claim_id: str) -> LeasedT | None:
    """The row that the claim holds, locked until the transaction ends. None if it is another's, or nobody's, now."""
    return session.scalar(select(table).where(table.claim_id == claim_id).with_for_update())


def renew(db: Database, table: type[Leased], claim_id: str, *, lease_seconds: float) -> bool:
    """The work goes on. False if nobody wants its result: the row was released or deleted, or another has it."""
    with db.write() as session:
        row = held(session, table, claim_id)
        if row is not None:
            row.lease_expires_at = read_clock(session) + lease_seconds
        return row is not None


def release(row: Leased) -> None:
    """The row, which is locked, is free."""
    row.claim_id = row.lease_expires_at = None
