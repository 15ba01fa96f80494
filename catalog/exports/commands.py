"""Users' operations on exports: create, list, show, cancel and delete them.

A project may export its own adapters and those that are shared with it. An export belongs to the project that requested
it, and counts toward its stored bytes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.orm import Session

from catalog.audit import log
from catalog.audit.log import AuditType
from catalog.caller import Caller
from catalog.db.database import Database, get_once, read_clock, serialize
from catalog.db.pagination import Page, paginate
from catalog.errors import Conflict, NotFound, RateLimited
from catalog.exports import formats, hub_repositories
from catalog.exports.formats import Format, Quantization
from catalog.fleet import views, workers
from catalog.registry import adapters, export_rows
from catalog.storage import quota
from catalog.tables.exports import UNFINISHED_EXPORTS, AdapterExport
from catalog.tables.jobs import Job
from catalog.tables.storage import Adapter, Artifact, BaseModelRow
from catalog.tables.table import Json, new_id
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskKind
from catalog.tenancy.authentication import check_valid

MAX_OPEN = 20
"""Maximum number of unfinished exports of a project."""
RETRY_SECONDS = 30.0
REPLACED = ("failed", "cancelled")
"""States of an export that a new one with the same options replaces."""


def create(
    db: Database,
    *,
    caller: Caller,
    adapter: str,
    format: Format,  # noqa: A002
    quantization: Quantization | None = None,
    hub_repository: str | None = None,
    allowed_repositories: Collection[str] = (),
    max_open: int = MAX_OPEN,
) -> AdapterExport:
    """Create an export, or return the unfinished or succeeded one with the same options.

    allowed_repositories: see catalog.exports.hub_repositories. Raises InvalidRequest if the format can't contain the
    adapter, NotFound, Conflict if the base model is missing, Forbidden if the repository is not allowed, QuotaExceeded,
    and RateLimited if the project has too many unfinished exports.
    """
    if hub_repository is not None:
        hub_repositories.check(hub_repository, allowed_repositories)
    quantization = formats.resolve(format, quantization, hub_repository=hub_repository)
    with db.write() as session:
        serialize(session, f"exports {caller.project_id}")
        now = read_clock(session)
        check_valid(session, caller.api_key_id, now=now)
        model = adapters.find(session, caller.project_id, adapter, locked=True, param="adapter")
        base = _base(session, model, format)
        lora: dict[str, Any] = session.get_one(Job, model.job_id).spec.get("lora") or {}
        description: dict[str, Any] = base.description or {}
        has_converter = workers.GGUF_CONVERTER in (views.integrations(session, now=now) or ())
        formats.check_model(format, description=description, lora=lora, has_converter=has_converter)
        options: Json = {
            "project_id": caller.project_id,
            "adapter_id": model.id,
            "adapter_artifact": model.artifact,
            "format": format,
            "quantization": quantization,
            "hub_repository": hub_repository,
        }
        same = _reusable(session, options, now=now)
        if same is not None:
            return same
        _refuse_too_many(session, caller.project_id, max_open)
        needed = formats.estimated_bytes(
            format, quantization, description=description, adapter_parameters=model.num_parameters
        )
        quota.check_stored(session, caller.project_id, needed, now=now)
        row = AdapterExport(
            id=new_id("export"),
            created_at=now,
            created_by=caller.api_key_id,
            adapter_name=model.name,
            base_model=model.base_model,
            base_digest=model.base_digest,
            status="queued",
            expected_bytes=needed,
            num_bytes=0,
            **options,
        )
        session.add(row)
        task_queue.add(session, TaskKind.EXPORT, row.id, project_id=row.project_id, run_after=now)
        _note(session, "adapter_export.created", row, now=now)
        return row


def _reusable(session: Session, options: Json, *, now: float) -> AdapterExport | None:
    """Return the unfinished or succeeded export with these columns. Deletes the others, which it would replace."""
    for found in session.scalars(select(AdapterExport).filter_by(**options).with_for_update()).all():
        if found.status not in REPLACED:
            return found
        export_rows.remove(session, found, now=now)
    return None


def list_page(
    db: Database, *, project_id: str, adapter: str, after: str | None = None, limit: int = 20
) -> Page[AdapterExport]:
    """Return a page of the project's exports of the adapter, newest first. Raises NotFound if the project has none and
    can't read the adapter."""
    with db.read() as session:
        scope = select(AdapterExport).where(AdapterExport.project_id == project_id, _is_of(adapter))
        if session.scalar(scope.limit(1)) is None:
            adapters.find(session, project_id, adapter, param="adapter")
        created, ident = AdapterExport.created_at, AdapterExport.id
        return paginate(session, scope, created=created, ident=ident, after=after, limit=limit)


def get(db: Database, *, project_id: str, adapter: str, export: str) -> AdapterExport:
    """Return an export of the project. Raises NotFound."""
    with db.read() as session:
        return _find(session, project_id, adapter, export)


def files_of(db: Database, *, project_id: str, adapter: str, export: str) -> tuple[AdapterExport, Artifact]:
    """Return an export and its files. Raises NotFound, and Conflict if it has none."""
    with db.snapshot() as session:
        row = _find(session, project_id, adapter, export)
        if row.artifact is not None:
            return row, session.get_one(Artifact, row.artifact)
        if row.format == "adapter":
            raise Conflict("export_has_no_files", id=row.id, adapter_name=row.adapter_name, param="export")
        if row.status in UNFINISHED_EXPORTS:
            raise Conflict(
                "export_not_ready", id=row.id, state=row.status, adapter_name=row.adapter_name, param="export"
            )
        raise Conflict("export_ended_without_files", id=row.id, state=row.status, param="export")


def cancel(db: Database, *, project_id: str, adapter: str, export: str) -> AdapterExport:
    """Cancel an unfinished export. A worker that makes it stops soon. A cancelled one is returned unchanged.

    Raises NotFound, and Conflict if it has finished.
    """
    with db.write() as session:
        row = _find(session, project_id, adapter, export, locked=True)
        if row.status == "cancelled":
            return row
        if row.status not in UNFINISHED_EXPORTS:
            raise Conflict("export_finished", id=row.id, state=row.status, param="export")
        end_unfinished(session, row, now=read_clock(session))
        return row


def end_unfinished(session: Session, row: AdapterExport, *, now: float) -> None:
    """Cancel an unfinished export, whose row is locked."""
    row.status, row.finished_at, row.error = "cancelled", now, None
    task_queue.remove(session, TaskKind.EXPORT, row.id)
    _note(session, "adapter_export.cancelled", row, now=now)


def delete(db: Database, *, project_id: str, adapter: str, export: str, is_client_retry: bool = False) -> str:
    """Delete an export in any state, with its files. Returns its id. Raises NotFound, unless is_client_retry: the
    client repeats a request without a reply. An upload to the Hub is not deleted."""
    with db.write() as session:
        try:
            row = _find(session, project_id, adapter, export, locked=True)
        except NotFound:
            if is_client_retry:
                return export
            raise
        now = read_clock(session)
        export_rows.remove(session, row, now=now)
        _note(session, "adapter_export.deleted", row, now=now)
        return row.id


def _base(session: Session, model: Adapter, format: Format) -> BaseModelRow:  # noqa: A002
    """Return the base model of the adapter, which can't be deleted until the transaction ends. Raises Conflict if it
    was deleted or replaced, and the format needs it."""
    base = get_once(session, BaseModelRow, model.base_model, lock="share")
    assert base is not None, "the row of a base model is never deleted"
    if format != "adapter" and (base.state != "ready" or base.digest != model.base_digest):
        raise Conflict(
            "export_base_changed", model=model.name, format=format, base_model=model.base_model, param="adapter"
        )
    return base


def _refuse_too_many(session: Session, project_id: str, max_open: int) -> None:
    unfinished = (AdapterExport.project_id == project_id, AdapterExport.status.in_(UNFINISHED_EXPORTS))
    if (session.scalar(select(func.count()).where(*unfinished)) or 0) >= max_open:
        raise RateLimited("too_many_exports", max_open=max_open, retry_after_seconds=RETRY_SECONDS, headers={})


def _is_of(adapter: str) -> ColumnElement[bool]:
    return or_(AdapterExport.adapter_id == adapter, AdapterExport.adapter_name == adapter)


def _find(session: Session, project_id: str, adapter: str, export: str, *, locked: bool = False) -> AdapterExport:
    own = select(AdapterExport).where(
        AdapterExport.id == export, AdapterExport.project_id == project_id, _is_of(adapter)
    )
    row = session.scalar(own.with_for_update() if locked else own)
    if row is None:
        raise NotFound("export_not_found", adapter=adapter, export=export, param="export")
    return row


def _note(session: Session, type: AuditType, row: AdapterExport, *, now: float) -> None:  # noqa: A002
    optional = {"quantization": row.quantization, "hub_repository": row.hub_repository}
    details = {"adapter": row.adapter_name, "format": row.format}
    details |= {name: value for name, value in optional.items() if value is not None}
    log.note(session, type, now=now, object_id=row.id, project_id=row.project_id, details=details)
