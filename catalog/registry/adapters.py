"""Finds, lists and deletes trained adapters. `complete` in catalog/queue/claims.py creates them.

Checkpoints that can be used as models are also found by name or id, and so are models that are shared with the project.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session, load_only

from catalog.audit import log
from catalog.db.database import Database, read_clock
from catalog.db.pagination import Page, paginate
from catalog.errors import NoLongerKept, NotFound
from catalog.registry import checkpoints, permissions
from catalog.tables.history import Checkpoint
from catalog.tables.jobs import Job, Sweep
from catalog.tables.storage import Adapter, AdapterExport, Artifact, BaseModelRow
from catalog.tables.table import Json
from catalog.tables.tenancy import ModelPermission
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskKind
from catalog.usage import ledger

MAX_MODELS = 1000
"""Maximum number of adapters, and of checkpoints, in the list of all models, which has no pages."""
MODEL_COLUMNS = (
    Adapter.id,
    Adapter.name,
    Adapter.created_at,
    Adapter.project_id,
    Adapter.base_model,
    Adapter.artifact,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterView:
    """An adapter with related data for API responses."""

    adapter: Adapter
    artifact: Artifact
    rank: int | None
    cost: Json | None = None
    """The measured cost of its newest export: `base_seconds` and `merged_seconds`. None: not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointModel:
    """A checkpoint that can be used as a model. project_id and base_model are those of its job."""

    name: str
    created_at: float
    project_id: str
    base_model: str
    artifact: str


def list_page(
    db: Database, *, project_id: str, after: str | None = None, limit: int = 20, shared: bool = False
) -> Page[AdapterView]:
    """Return a page of the project's adapters, newest first.

    shared: returns the adapters that other projects share with it instead, by the time of the permission.
    """
    own = select(Adapter).where(Adapter.project_id == project_id)
    scope, created, ident = own, Adapter.created_at, Adapter.id
    if shared:
        scope, created, ident = (
            permissions.shared_with(project_id),
            ModelPermission.created_at,
            ModelPermission.model_id,
        )
    visible = (Adapter.deleted_at.is_(None),)
    with db.snapshot() as session:
        page = paginate(session, scope, created=created, ident=ident, after=after, limit=limit, visible=visible)
        return Page(items=[_view(session, row) for row in page.items], has_more=page.has_more)


def list_models(db: Database, *, project_id: str, limit: int = MAX_MODELS) -> Page[Adapter]:
    """Return the project's newest adapters, then those that are shared with it.

    Loads only MODEL_COLUMNS, because lineage records are large.
    """
    own_adapters = select(Adapter).where(Adapter.project_id == project_id)
    newest_first = Adapter.created_at.desc(), Adapter.id
    found: list[Adapter] = []
    with db.read() as session:
        for scope in (own_adapters, permissions.shared_with(project_id)):
            existing = scope.where(Adapter.deleted_at.is_(None)).options(load_only(*MODEL_COLUMNS, raiseload=True))
            found += session.scalars(existing.order_by(*newest_first).limit(limit + 1 - len(found)))
    return Page(items=found[:limit], has_more=len(found) > limit)


def get(db: Database, *, project_id: str, name: str, param: str = "adapter") -> AdapterView:
    """Return the adapter with this id or name, or the best adapter of the finished sweep with this id.

    param: for errors. Raises NotFound, and NoLongerKept for a checkpoint.
    """
    with db.snapshot() as session:
        return _view(session, find(session, project_id, _named(session, project_id, name, param), param=param))


def delete(
    db: Database, *, project_id: str, name: str, is_client_retry: bool = False, param: str = "adapter"
) -> Adapter:
    """Delete an adapter of the project, or the model of a checkpoint.

    Its exports are deleted with it. An adapter is only hidden: its row stays for the lineage of adapters that continue
    it. Raises NotFound, also for a model that another project shares with this one. Raises Conflict while an unfinished
    job continues the adapter, because each attempt reads its files. is_client_retry: the client repeats a request
    without a reply, so a deleted adapter is returned. param: for errors.
    """
    with db.write() as session:
        if checkpoints.is_named(name):
            return _delete_checkpoint(session, project_id, name, is_client_retry=is_client_retry, param=param)
        adapter = _own(session, project_id, name, param=param, include_deleted=is_client_retry)
        if adapter.deleted_at is not None:
            return adapter
        if children := checkpoints.unfinished_children(session, adapter.id, project_id):
            raise checkpoints.in_use("adapter", adapter.name, children, project_id, param=param)
        adapter.deleted_at = now = read_clock(session)
        remove_exports(session, adapter.id, now=now)
        ledger.count(session, "adapters", number=-1)
        ledger.store(session, adapter.project_id, -session.get_one(Artifact, adapter.artifact).num_bytes, now=now)
        return _note_deleted(session, adapter)


def ids_by_job(db: Database, job_ids: Collection[str]) -> dict[str, str]:
    """Return the adapter id of each job whose adapter exists and is not deleted."""
    if not job_ids:
        return {}
    of_jobs = select(Adapter.job_id, Adapter.id).where(Adapter.job_id.in_(job_ids), Adapter.deleted_at.is_(None))
    with db.read() as session:
        return {row[0]: row[1] for row in session.execute(of_jobs)}


def list_checkpoint_models(db: Database, *, project_id: str) -> Page[CheckpointModel]:
    """Return the newest checkpoints that can be used as models: of the project's jobs, then those shared with it."""
    own = checkpoints.kept().where(Job.project_id == project_id)
    newest_first = Checkpoint.created_at.desc(), Checkpoint.id
    columns = Checkpoint.name, Checkpoint.created_at, Job.project_id, Job.base_model, Checkpoint.adapter
    found: list[CheckpointModel] = []
    with db.read() as session:
        for kept in (own, permissions.checkpoints_shared_with(project_id)):
            newest = kept.with_only_columns(*columns).order_by(*newest_first).limit(MAX_MODELS + 1 - len(found))
            for name, created_at, owner, base, artifact in session.execute(newest):
                assert artifact is not None, "only such checkpoints are selected"
                found.append(
                    CheckpointModel(
                        name=name, created_at=created_at, project_id=owner, base_model=base, artifact=artifact
                    )
                )
    return Page(items=found[:MAX_MODELS], has_more=len(found) > MAX_MODELS)


def find(session: Session, project_id: str, name: str, *, locked: bool = False, param: str | None = None) -> Adapter:
    """Return the model with this name or id that the project may read: an adapter or checkpoint, own or shared.

    locked: prevents its deletion until the transaction ends. Raises NotFound, NoLongerKept.
    """
    if checkpoints.is_named(name):
        is_visible = permissions.may_read_checkpoint(project_id)
        checkpoint = checkpoints.row(session, is_visible, name, locked=locked)
        if checkpoint is None:
            raise NotFound("checkpoint_not_found", name=name, param=param)
        return checkpoints.as_adapter(session, checkpoint, reader=project_id, param=param)
    named = select(Adapter).where(or_(Adapter.id == name, Adapter.name == name), Adapter.deleted_at.is_(None))
    readable = named.where(permissions.may_read_adapter(project_id))
    adapter = session.scalar(readable.with_for_update(read=True) if locked else readable)
    if adapter is None:
        raise NotFound(
            "openai_adapter_not_found" if _is_of_openai(session, name) else "adapter_not_found", name=name, param=param
        )
    return adapter


def _is_of_openai(session: Session, name: str) -> bool:
    """Return whether this is the name of a model that was fine-tuned at OpenAI: its base model is unknown here."""
    prefix, _, rest = name.partition(":")
    return prefix == "ft" and session.get(BaseModelRow, rest.partition(":")[0]) is None


def children(db: Database, *, project_id: str, name: str) -> list[Adapter]:
    """Return the project's adapters that continue this one, oldest first. Raises NotFound."""
    with db.read() as session:
        parent = find(session, project_id, name)
        made = select(Adapter).join(Job, Job.id == Adapter.job_id).where(Job.parent_adapter == parent.id)
        kept = made.where(Adapter.project_id == project_id, Adapter.deleted_at.is_(None))
        return list(session.scalars(kept.order_by(Adapter.created_at, Adapter.id)))


def _named(session: Session, project_id: str, name: str, param: str) -> str:
    """Resolve the id of a sweep to the id of its best adapter. Other names are returned unchanged."""
    if not name.startswith("sweep-"):
        return name
    own_adapters = select(Adapter.id).join(Sweep, Sweep.best_job == Adapter.job_id)
    found = session.scalar(
        own_adapters.where(Sweep.id == name, Sweep.project_id == project_id, Adapter.deleted_at.is_(None))
    )
    if found is None:
        sweep = session.scalar(select(Sweep).where(Sweep.id == name, Sweep.project_id == project_id))
        raise _no_best_adapter(sweep, name, param)
    return found


def _no_best_adapter(sweep: Sweep | None, name: str, param: str) -> NotFound:
    """Return the error for a sweep without a best adapter. `sweep`: None if the project has no such sweep."""
    if sweep is None:
        return NotFound("sweep_of_adapter_not_found", name=name, param=param)
    if sweep.finished_at is None:
        return NotFound("best_adapter_of_running_sweep", sweep=sweep.id, param=param)
    if sweep.best_job is None:
        return NotFound("best_adapter_of_failed_sweep", sweep=sweep.id, param=param)
    return NotFound("best_adapter_deleted", sweep=sweep.id, param=param)


def _own(session: Session, project_id: str, name: str, *, param: str, include_deleted: bool = False) -> Adapter:
    """Return the project's adapter, locked. The lock prevents new jobs from continuing it."""
    named = or_(Adapter.id == name, Adapter.name == name)
    own_adapters = select(Adapter).where(named, Adapter.project_id == project_id)
    if not include_deleted:
        own_adapters = own_adapters.where(Adapter.deleted_at.is_(None))
    adapter = session.scalar(own_adapters.with_for_update())
    if adapter is None:
        raise NotFound("own_adapter_not_found", name=name, param=param)
    return adapter


def _delete_checkpoint(session: Session, project_id: str, name: str, *, is_client_retry: bool, param: str) -> Adapter:
    checkpoint = checkpoints.row(session, Job.project_id == project_id, name, locked=True)
    if checkpoint is None:
        raise NotFound("own_checkpoint_not_found", name=name, param=param)
    try:
        adapter = checkpoints.as_adapter(session, checkpoint, reader=project_id)
    except NoLongerKept as error:
        if is_client_retry:
            return Adapter(id=checkpoint.id, name=checkpoint.name)
        raise NoLongerKept("checkpoint_expired", name=name, param=param) from error
    checkpoints.delete(session, checkpoint, param=param)
    remove_exports(session, checkpoint.id, now=read_clock(session))
    return _note_deleted(session, adapter)


def _note_deleted(session: Session, adapter: Adapter) -> Adapter:
    owner, details = adapter.project_id, {"name": adapter.name}
    now = read_clock(session)
    log.note(session, "adapter.deleted", now=now, object_id=adapter.id, project_id=owner, details=details)
    return adapter


def _view(session: Session, adapter: Adapter) -> AdapterView:
    job = session.get_one(Job, adapter.job_id)
    lora: dict[str, Any] = job.spec.get("lora") or {}
    return AdapterView(
        adapter=adapter,
        artifact=session.get_one(Artifact, adapter.artifact),
        rank=lora.get("rank"),
        cost=newest_export_cost(session, adapter),
    )


def newest_export_cost(session: Session, adapter: Adapter) -> Json | None:
    """Return the cost that the newest measured export of the adapter's project has."""
    own = (AdapterExport.adapter_id == adapter.id, AdapterExport.project_id == adapter.project_id)
    measured = select(AdapterExport.cost).where(*own, AdapterExport.cost.is_not(None))
    return session.scalar(measured.order_by(AdapterExport.created_at.desc(), AdapterExport.id).limit(1))


def remove_exports(session: Session, adapter_id: str, *, now: float) -> None:
    """Delete the exports of an adapter or checkpoint, in all projects. Workers stop the unfinished ones."""
    of_adapter = select(AdapterExport).where(AdapterExport.adapter_id == adapter_id).with_for_update()
    for row in session.scalars(of_adapter.order_by(AdapterExport.id)).all():
        remove_export(session, row, now=now)


def remove_export(session: Session, row: AdapterExport, *, now: float) -> None:
    """Delete a row, which the caller has locked. Garbage collection deletes the files."""
    ledger.store(session, row.project_id, -row.num_bytes, now=now)
    task_queue.remove(session, TaskKind.EXPORT, row.id)
    session.delete(row)
