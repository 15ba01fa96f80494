"""Deletes rows of exports with their stored bytes, and finds measured costs. catalog/exports has the operations."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from catalog.tables.exports import AdapterExport
from catalog.tables.storage import Adapter
from catalog.tables.table import Json
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskKind
from catalog.usage import ledger


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
    task_queue.remove(session, TaskKind.EXPORT, row.id)
    session.delete(row)
