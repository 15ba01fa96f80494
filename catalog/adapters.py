"""Trained adapters as people read them. `complete` in claims makes them; here they are found, listed and hidden."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from catalog import audit, daily
from catalog.db import Database, read_clock
from catalog.errors import Conflict, NotFound
from catalog.pages import Page, paginate
from catalog.states import UNFINISHED_STATES
from catalog.tables import Adapter, Artifact, Checkpoint, Job, Sweep


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterView:
    """An adapter with what it takes to show it."""

    adapter: Adapter
    artifact: Artifact
    rank: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointView:
    """A checkpoint whose files are kept, and the job that it is of."""

    checkpoint: Checkpoint
    job: Job


def list_page(db: Database, *, project_id: str, after: str | None = None, limit: int = 20) -> Page[AdapterView]:
    """Newest first."""
    scope = select(Adapter).where(Adapter.project_id == project_id)
    with db.read() as session:
        page = paginate(
            session,
            scope,
            created=Adapter.created_at,
            ident=Adapter.id,
            after=after,
            limit=limit,
            visible=(Adapter.deleted_at.is_(None),),
        )
        return Page(items=[_view(session, row) for row in page.items], has_more=page.has_more)


def list_all(db: Database, *, project_id: str) -> list[Adapter]:
    """Every adapter of the project, newest first."""
    mine = select(Adapter).where(Adapter.project_id == project_id, Adapter.deleted_at.is_(None))
    with db.read() as session:
        return list(session.scalars(mine.order_by(Adapter.created_at.desc(), Adapter.id)))


def get(db: Database, *, project_id: str, name: str) -> AdapterView:
    """By id or by name, or by the id of a sweep that has ended: its best. Raises NotFound."""
    with db.read() as session:
        return _view(session, _find(session, project_id, _named(session, project_id, name)))


def delete(db: Database, *, project_id: str, name: str, is_client_retry: bool = False) -> Adapter:
    """Hide the adapter. Its row stays, for the records of what was made from it.

    is_client_retry: the client says that it sends this again, having had no reply; then one that is deleted is its
    answer. Raises Conflict while a job that has not ended continues it: its files are read at each attempt.
    """
    with db.write() as session:
        adapter = _find(session, project_id, name, lock=True, even_deleted=is_client_retry)
        if adapter.deleted_at is not None:
            return adapter
        child = session.scalar(
            select(Job.id).where(Job.parent_adapter == adapter.id).where(Job.state.in_(UNFINISHED_STATES)).limit(1)
        )
        if child is not None:
            raise Conflict(
                f"The adapter {adapter.name!r} is continued by the job {child}, which has not ended.",
                code="adapter_in_use",
                remedy="Wait until the job ends, or cancel it; then delete the adapter.",
                param="adapter",
            )
        adapter.deleted_at = now = read_clock(session)
        daily.store(session, adapter.project_id, -session.get_one(Artifact, adapter.artifact).num_bytes, now=now)
        audit.note(
            session,
            "adapter.deleted",
            now=now,
            object_id=adapter.id,
            project_id=adapter.project_id,
            details={"name": adapter.name},
        )
        return adapter


def ids_by_job(db: Database, job_ids: Collection[str]) -> dict[str, str]:
    """The id of each job's adapter, where it has one that is kept."""
    if not job_ids:
        return {}
    of_jobs = select(Adapter.job_id, Adapter.id).where(Adapter.job_id.in_(job_ids), Adapter.deleted_at.is_(None))
    with db.read() as session:
        return {row[0]: row[1] for row in session.execute(of_jobs)}


def kept_checkpoints(db: Database, *, project_id: str) -> list[CheckpointView]:
    """Checkpoints of the project's jobs that still have their files, newest first."""
    kept = select(Checkpoint, Job).join(Job, Job.id == Checkpoint.job_id)
    mine = kept.where(Job.project_id == project_id, Checkpoint.artifact.is_not(None))
    with db.read() as session:
        rows = session.execute(mine.order_by(Checkpoint.created_at.desc(), Checkpoint.id)).all()
        return [CheckpointView(checkpoint=checkpoint, job=job) for checkpoint, job in rows]


def checkpoint_name(job: Job, checkpoint: Checkpoint, *, project_name: str) -> str:
    """The wire's fine_tuned_model_checkpoint: the adapter's name, or the one that it will have, and the step."""
    stem = job.adapter_name or f"ft:{job.base_model}:{project_name}:{job.suffix or ''}:{job.id[-8:]}"
    return f"{stem}:ckpt-step-{checkpoint.step}"


def children(db: Database, *, project_id: str, name: str) -> list[Adapter]:
    """The adapters that continue one, the oldest first. Raises NotFound for it."""
    with db.read() as session:
        parent = _find(session, project_id, name)
        made = select(Adapter).join(Job, Job.id == Adapter.job_id).where(Job.parent_adapter == parent.id)
        kept = made.where(Adapter.project_id == project_id, Adapter.deleted_at.is_(None))
        return list(session.scalars(kept.order_by(Adapter.created_at, Adapter.id)))


def _named(session: Session, project_id: str, name: str) -> str:
    """The adapter's own name, of a sweep's that of its best trial."""
    if not name.startswith("sweep-"):
        return name
    mine = select(Adapter.id).join(Sweep, Sweep.best_job == Adapter.job_id)
    found = session.scalar(mine.where(Sweep.id == name, Sweep.project_id == project_id, Adapter.deleted_at.is_(None)))
    if found is None:
        remedy = "A sweep has one once all its trials have ended and one has succeeded: GET /v1/sweeps/{id} tells."
        raise NotFound("adapter", name, remedy=remedy)
    return found


def _find(session: Session, project_id: str, name: str, *, lock: bool = False, even_deleted: bool = False) -> Adapter:
    """`lock` keeps new jobs from continuing it."""
    named = or_(Adapter.id == name, Adapter.name == name)
    mine = select(Adapter).where(named, Adapter.project_id == project_id)
    if not even_deleted:
        mine = mine.where(Adapter.deleted_at.is_(None))
    adapter = session.scalar(mine.with_for_update() if lock else mine)
    if adapter is None:
        raise NotFound("adapter", name)
    return adapter


def _view(session: Session, adapter: Adapter) -> AdapterView:
    job = session.get_one(Job, adapter.job_id)
    lora: dict[str, Any] = job.spec.get("lora") or {}
    return AdapterView(adapter=adapter, artifact=session.get_one(Artifact, adapter.artifact), rank=lora.get("rank"))
