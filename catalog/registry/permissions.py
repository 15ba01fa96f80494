"""Shares an adapter or a checkpoint with other projects of its organization, on behalf of operators.

A project with a permission may download and continue the model, but can't see anything else of its job. Its jobs that
continue the model keep running when the permission is revoked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, exists, or_, select, true
from sqlalchemy.orm import Session

from catalog.audit import log
from catalog.db.database import Database, read_clock
from catalog.db.pagination import Order, Page, paginate
from catalog.errors import InvalidRequest, NotFound
from catalog.registry import checkpoints
from catalog.tables.history import Checkpoint
from catalog.tables.jobs import Job
from catalog.tables.storage import Adapter
from catalog.tables.table import new_id
from catalog.tables.tenancy import ModelPermission, Project
from catalog.tenancy import projects
from catalog.tenancy.authentication import Caller


def may_read_adapter(project_id: str) -> ColumnElement[bool]:
    """Condition for adapters that the project owns or that are shared with it."""
    return or_(Adapter.project_id == project_id, _is_shared(Adapter.id, project_id))


def may_read_checkpoint(project_id: str) -> ColumnElement[bool]:
    """Like `may_read_adapter`, for queries of Checkpoint joined with Job."""
    return or_(Job.project_id == project_id, _is_shared(Checkpoint.id, project_id))


def grant(db: Database, *, caller: Caller, model: str, projects_named: Sequence[str]) -> list[ModelPermission]:
    """Let these projects, named by id or name, read the model. An existing permission is kept.

    Raises NotFound for the model or for a project, also for one of another organization, and InvalidRequest for the
    model's own project. After an error, no permission is granted.
    """
    with db.write() as session:
        shared = _model(session, model, locked=True)
        owner = session.get_one(Project, shared.project_id)
        readers = [
            projects.find(session, caller=caller, project=one, param="project_ids", same_organization_as=owner)
            for one in projects_named
        ]
        for named, reader in zip(projects_named, readers, strict=True):
            if reader.id == shared.project_id:
                raise InvalidRequest(
                    "own_model", reader=reader.name, shared=shared.name, named=named, param="project_ids"
                )
        now = read_clock(session)
        ids = dict.fromkeys(reader.id for reader in readers)
        return [_grant(session, shared, reader_id, caller=caller, now=now) for reader_id in ids]


def list_page(
    db: Database,
    *,
    model: str,
    project_id: str | None = None,
    after: str | None = None,
    limit: int = 10,
    order: Order = "desc",
) -> Page[ModelPermission]:
    """Return a page of the model's permissions. project_id: returns only the permission of this project."""
    with db.read() as session:
        scope = select(ModelPermission).where(ModelPermission.model_id == _model(session, model).id)
        if project_id is not None:
            scope = scope.where(ModelPermission.project_id == project_id)
        created, ident = ModelPermission.created_at, ModelPermission.id
        return paginate(session, scope, created=created, ident=ident, after=after, limit=limit, order=order)


def revoke(db: Database, *, model: str, permission_id: str, is_client_retry: bool = False) -> None:
    """Revoke a permission. Raises NotFound, unless is_client_retry: the client repeats a request without a reply."""
    with db.write() as session:
        shared, row = _model(session, model), session.get(ModelPermission, permission_id)
        if row is not None and row.model_id == shared.id:
            session.delete(row)
            _note(session, "permission.deleted", row, shared, now=read_clock(session))
        elif not is_client_retry:
            raise NotFound(
                "permission_not_found", shared=shared.name, permission_id=permission_id, param="permission_id"
            )


def shared_with(project_id: str) -> Select[Adapter]:
    """Adapters of other projects that the project may read, including deleted ones."""
    given = ModelPermission.model_id == Adapter.id, ModelPermission.project_id == project_id
    return select(Adapter).join(ModelPermission, and_(*given))


def checkpoints_shared_with(project_id: str) -> Select[Checkpoint, Job]:
    """Checkpoints of other projects that the project may read, with their jobs."""
    given = ModelPermission.model_id == Checkpoint.id, ModelPermission.project_id == project_id
    return checkpoints.kept().join(ModelPermission, and_(*given))


def _is_shared(model_id: Any, project_id: str) -> ColumnElement[bool]:
    return exists().where(ModelPermission.model_id == model_id, ModelPermission.project_id == project_id)


def _model(session: Session, name: str, *, locked: bool = False) -> Adapter:
    """Return the model of any project, for operators. Raises NotFound, NoLongerKept."""
    if checkpoints.is_named(name):
        checkpoint = checkpoints.row(session, true(), name, locked=locked)
        if checkpoint is None:
            raise NotFound("grantable_checkpoint_not_found", name=name, param="fine_tuned_model")
        return checkpoints.as_adapter(session, checkpoint, param="fine_tuned_model")
    named = select(Adapter).where(or_(Adapter.id == name, Adapter.name == name), Adapter.deleted_at.is_(None))
    adapter = session.scalar(named.with_for_update() if locked else named)
    if adapter is None:
        raise NotFound("grantable_adapter_not_found", name=name, param="fine_tuned_model")
    return adapter


def _grant(session: Session, shared: Adapter, reader_id: str, *, caller: Caller, now: float) -> ModelPermission:
    """Return the project's permission, or create it. The model's row is locked, which prevents duplicates."""
    same = select(ModelPermission).where(ModelPermission.model_id == shared.id, ModelPermission.project_id == reader_id)
    found = session.scalar(same)
    if found is None:
        found = ModelPermission(id=new_id("cp"), model_id=shared.id, project_id=reader_id, created_at=now)
        found.created_by = caller.api_key_id
        session.add(found)
        _note(session, "permission.created", found, shared, now=now)
    return found


def _note(session: Session, type: log.AuditType, given: ModelPermission, shared: Adapter, *, now: float) -> None:  # noqa: A002
    details = {"model": shared.name, "to": given.project_id}
    log.note(session, type, now=now, object_id=given.id, project_id=shared.project_id, details=details)
