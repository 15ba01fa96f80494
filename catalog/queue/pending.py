"""Plans that wait to be computed, as queries."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Select, and_, or_, select

from catalog.tables.plans import Plan


def first(*, now: float) -> Select[Plan]:
    """The oldest that may be taken now."""
    return select(Plan).where(is_waiting(now=now)).order_by(Plan.created_at).limit(1)


def is_waiting(*, now: float) -> ColumnElement[bool]:
    """Nobody holds it, or who did was not heard from for a lease."""
    is_free = or_(Plan.lease_expires_at.is_(None), Plan.lease_expires_at <= now)
    return and_(Plan.state == "computing", is_free, or_(Plan.run_after.is_(None), Plan.run_after <= now))
