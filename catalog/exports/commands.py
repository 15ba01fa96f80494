"""Operations on exports: of users (create, list, cancel, delete) and of workers (begin, refuse, record the result).

A project may export its own adapters and those that are shared with it. An export belongs to the project that requested
it, and counts toward its stored bytes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.orm import Session

from catalog.audit import log
from catalog.audit.log import AuditType
from catalog.caller import Caller
from catalog.db.database import Database, get_once, read_clock, serialize
from catalog.db.pagination import Page, paginate
from catalog.error_texts import ErrorText
from catalog.errors import Conflict, LorryError, NotFound, RateLimited, StaleClaim
from catalog.exports import formats
from catalog.exports.formats import Format, Needs, Quantization
from catalog.fleet import views, workers
from catalog.registry import adapters
from catalog.storage import quota
from catalog.storage.manifest import Manifest, show_artifact
from catalog.tables.history import Checkpoint
from catalog.tables.jobs import Job
from catalog.tables.storage import UNFINISHED_EXPORTS, Adapter, AdapterExport, Artifact, BaseModelRow
from catalog.tables.table import Json, new_id
from catalog.tasks import task_queue
from catalog.tasks.outcomes import TaskSubject
from catalog.tasks.task_queue import TaskClaim, TaskKind
from catalog.tenancy.authentication import check_valid
from catalog.usage import ledger

MAX_OPEN = 20
"""Maximum number of unfinished exports of a project."""
RETRY_SECONDS = 30.0
REPLACED = ("failed", "cancelled")
"""States of an export that a new one with the same options replaces."""
MAX_WAIT_SECONDS = 86400.0
"""How long workers may refuse an export before it fails. Within a day, jobs end that hold memory and disk space, and
busy workers become free."""


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

    allowed_repositories: see catalog.exports.formats. Raises InvalidRequest if the format can't contain the
    adapter, NotFound, Conflict if the base model is missing, Forbidden if the repository is not allowed, QuotaExceeded,
    and RateLimited if the project has too many unfinished exports.
    """
    if hub_repository is not None:
        formats.check_hub_repository(hub_repository, allowed_repositories)
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
        adapters.remove_export(session, found, now=now)
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
        adapters.remove_export(session, row, now=now)
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


@dataclass(frozen=True, kw_only=True, slots=True)
class WaitingExport:
    """A claimed export that has not begun, and what it needs on its worker."""

    export_id: str
    adapter_bytes: int
    """Size of the adapter's files, which are fetched."""
    needs: Needs
    needs_converter: bool
    """Only llama.cpp's converter can write its GGUF file."""
    was_refused: bool
    """A worker has refused it since it was created or last began."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportClaim:
    """An export that this worker makes."""

    task: TaskClaim
    export_id: str
    adapter_name: str
    adapter_artifact: str
    lineage: Json | None
    """The adapter's lineage record. None for a checkpoint whose model was deleted since the request."""
    base_model: str
    base_digest: str
    format: str
    quantization: str | None
    hub_repository: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportResult:
    """The result of an export. manifest: None for the format adapter."""

    manifest: Manifest | None
    verification: Json | None
    cost: Json | None
    hub_url: str | None


def inspect(db: Database, task: TaskClaim) -> WaitingExport:
    """Return what a claimed export needs. Raises StaleClaim."""
    with db.read() as session:
        row = session.get(AdapterExport, task.subject)
        if row is None:
            raise StaleClaim(task.claim_id)
        description: Json = session.get_one(BaseModelRow, row.base_model).description or {}
        artifact = session.get(Artifact, row.adapter_artifact)
        needs = formats.needs(row.format, row.quantization, description=description, stored_bytes=row.expected_bytes)
        return WaitingExport(
            export_id=row.id,
            adapter_bytes=0 if artifact is None else artifact.num_bytes,
            needs=needs,
            needs_converter=row.format == "gguf" and not formats.is_written_by_lorry(description),
            was_refused=row.refused_since is not None,
        )


def begin(db: Database, task: TaskClaim) -> ExportClaim:
    """Record that this worker makes the export. Raises StaleClaim."""
    with db.write() as session:
        row = task_queue.hold(session, task, AdapterExport)
        model = session.get(Adapter, row.adapter_id) or session.get(Checkpoint, row.adapter_id)
        row.status, row.started_at = "running", row.started_at or read_clock(session)
        row.error = row.refused_since = None
        return ExportClaim(
            task=task,
            export_id=row.id,
            adapter_name=row.adapter_name,
            adapter_artifact=row.adapter_artifact,
            lineage=model.lineage if model is not None else None,
            base_model=row.base_model,
            base_digest=row.base_digest,
            format=row.format,
            quantization=row.quantization,
            hub_repository=row.hub_repository,
        )


def refuse(db: Database, task: TaskClaim, error: LorryError) -> None:
    """Leave the export to other workers, because this one lacks what it needs: the attempt does not count.

    The export fails if no worker has begun it MAX_WAIT_SECONDS after the first refusal. Raises StaleClaim.
    """
    with db.write() as session:
        row, now = task_queue.hold(session, task, AdapterExport), read_clock(session)
        row.refused_since = since = now if row.refused_since is None else row.refused_since
        if since <= now - MAX_WAIT_SECONDS:
            message = f"{error.message} No worker has taken the export for {(now - since) / 3600:.0f} hours."
            remedy = f"{error.remedy} Then create the export again."
            _fail(session, row, replace(error.text, message=message, remedy=remedy), False)
            task_queue.finish(session, task)
            return
        row.status, row.error = "queued", error.text.report()  # a worker that was lost may have left it running
        task_queue.release_in(session, task)


def finish(db: Database, task: TaskClaim, exported: ExportResult) -> None:
    """Record the result, and charge its bytes to the project. Raises StaleClaim, QuotaExceeded."""
    with db.write() as session:
        row, now = task_queue.hold(session, task, AdapterExport), read_clock(session)
        if exported.manifest is not None:
            num_bytes = exported.manifest.num_bytes
            quota.check_stored(session, row.project_id, num_bytes, now=now, is_finished_export=True)
            row.artifact = show_artifact(session, exported.manifest, now=now)
            row.num_bytes = num_bytes
            ledger.store(session, row.project_id, row.num_bytes, now=now)
        row.verification, row.cost, row.hub_url = exported.verification, exported.cost, exported.hub_url
        row.status, row.finished_at, row.error = "succeeded", now, None
        task_queue.finish(session, task)


def _fail(session: Session, row: AdapterExport, error: ErrorText, _is_refused: bool) -> None:
    row.status, row.error, row.finished_at = "failed", error.report(), read_clock(session)


def _postpone(_session: Session, row: AdapterExport, error: ErrorText | None, _run_after: float | None) -> None:
    row.status, row.error = "queued", error and error.report()


EXPORT = TaskSubject(table=AdapterExport, lost="export_lost", fail=_fail, postpone=_postpone)
