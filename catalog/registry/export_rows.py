"""Rows of exports: which one is next, and their deletion with the stored bytes. catalog/exports has the operations."""

from __future__ import annotations

from sqlalchemy import Select, or_, select
from sqlalchemy.orm import Session

from catalog.db import lease
from catalog.tables.exports import UNFINISHED_EXPORTS, AdapterExport
from catalog.tables.storage import Adapter
from catalog.tables.table import Json
from catalog.usage import ledger


def waiting(*, now: float) -> Select[AdapterExport]:
    """The exports that wait for a worker, the one that has waited longest first. The projects take turns: one with a
    running export waits for the others."""
    is_due = or_(AdapterExport.run_after.is_(None), AdapterExport.run_after <= now)
    is_free = (AdapterExport.status.in_(UNFINISHED_EXPORTS), lease.is_free(AdapterExport, now=now), is_due)
    other = AdapterExport.__table__.alias("other")
    has_running = (
        select(other.c.id)
        .where(other.c.project_id == AdapterExport.project_id, other.c.lease_expires_at > now)
        .exists()
    )
    order = (has_running, AdapterExport.created_at, AdapterExport.id)
    return select(AdapterExport).where(*is_free).order_by(*order)


def newest_cost(session: Session, adapter: Adapter) -> Json | None:
    """Return the cost that the newest measured export of the adapter's project has."""
    own = (AdapterExport.adapter_id == adapter.id, AdapterExport.project_id == adapter.project_id)
    measured = select(AdapterExport.cost).where(*own, AdapterExport.cost.is_not(None))
    return session.scalar(measured.order_by(AdapterExport.created_at.desc(), AdapterExport.id).limit(1))


def remove_all(session: Session, adapter_id: str, *, now: float) -> None:
    """Delete the exports of an adapter or checkpoint, in all projects. Workers stop the unfinished ones."""
    of_adapter = select(AdapterExport).where(AdapterExport.adapter_id == adapter_id).with_for_update()
    for row in session.scalars(of_adapter.order_by(AdapterExport.id)).all():
        remove(session, row, now=now)


def remove(session: Session, row: AdapterExport, *, now: float) -> None:
    """Delete a row, which the caller has locked. Garbage collection deletes the files."""
    ledger.store(session, row.project_id, -row.num_bytes, now=now)
    session.delete(row)
