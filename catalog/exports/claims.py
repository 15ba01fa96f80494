"""The work of workers on exports: read the needs of a claimed export, begin or refuse it, and record its result."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sqlalchemy.orm import Session

from catalog.db.database import Database, read_clock
from catalog.error_texts import ErrorText
from catalog.errors import LorryError, StaleClaim
from catalog.exports import formats
from catalog.exports.formats import Needs
from catalog.storage import artifact_index, quota
from catalog.storage.manifest import Manifest
from catalog.tables.exports import AdapterExport
from catalog.tables.history import Checkpoint
from catalog.tables.storage import Adapter, Artifact, BaseModelRow
from catalog.tables.table import Json
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskClaim
from catalog.usage import ledger

MAX_WAIT_SECONDS = 86400.0
"""How long workers may refuse an export before it fails. Within a day, jobs end that hold memory and disk space, and
busy workers become free."""


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
            _fail(session, row, task, replace(error.text, message=message, remedy=remedy))
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
            row.artifact = artifact_index.show(session, exported.manifest, now=now)
            row.num_bytes = num_bytes
            ledger.store(session, row.project_id, row.num_bytes, now=now)
        row.verification, row.cost, row.hub_url = exported.verification, exported.cost, exported.hub_url
        row.status, row.finished_at, row.error = "succeeded", now, None
        task_queue.finish(session, task)


def fail(db: Database, task: TaskClaim, error: LorryError) -> None:
    """Mark the export as failed: the same attempt would fail again. Raises StaleClaim."""
    with db.write() as session:
        _fail(session, task_queue.hold(session, task, AdapterExport), task, error.text)


def retry(db: Database, task: TaskClaim, error: LorryError) -> None:
    """Let another worker make the export, which may be the cause of the error. The last attempt fails it.

    Raises StaleClaim.
    """
    with db.write() as session:
        row = task_queue.hold(session, task, AdapterExport)
        row.status = "queued"
        if not task_queue.retry(session, task):
            row.status, row.error, row.finished_at = "failed", error.text.report(), read_clock(session)


def release(db: Database, task: TaskClaim, *, wait_seconds: float = 0) -> None:
    """Let another worker make the export, because this one exits or the store does not answer. Raises StaleClaim."""
    with db.write() as session:
        task_queue.hold(session, task, AdapterExport).status = "queued"
        task_queue.release_in(session, task, wait_seconds=wait_seconds)


def _fail(session: Session, row: AdapterExport, task: TaskClaim, error: ErrorText) -> None:
    row.status, row.error, row.finished_at = "failed", error.report(), read_clock(session)
    task_queue.finish(session, task)
