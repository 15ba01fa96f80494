"""A worker's operations on exports: claim one, record its result, and fail or release it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.orm import Session

from catalog.db import lease
from catalog.db.database import Database, read_clock, serialized_at
from catalog.errors import LorryError, StaleClaim
from catalog.exports import formats
from catalog.exports.formats import Needs
from catalog.registry import export_rows
from catalog.storage import artifact_index, quota
from catalog.storage.manifest import Manifest
from catalog.tables.exports import AdapterExport
from catalog.tables.fleet import Worker
from catalog.tables.history import Checkpoint
from catalog.tables.storage import Adapter, Artifact, BaseModelRow
from catalog.tables.table import Json
from catalog.usage import ledger

MAX_ATTEMPTS = 3
"""Workers that may fail to make an export before it fails: it may be the cause."""

REFUSAL_SECONDS = 60.0
"""How long a worker that has refused an export leaves it to others."""
MAX_WAIT_SECONDS = 86400.0
"""How long workers may refuse an export before it fails. Within a day, jobs end that hold memory and disk space, and
busy workers become free."""
MAX_LOOKED_AT = 200
"""Maximum number of waiting exports that a worker considers at once, without those that it has just refused."""
MAX_READS = 3
"""How often a worker reads the waiting exports at one time. It reads them again if their order has changed since."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WaitingExport:
    """An export that a worker may make, and what it needs there."""

    export_id: str
    num_attempts: int
    adapter_bytes: int
    """Size of the adapter's files, which are fetched."""
    needs: Needs
    needs_converter: bool
    """Only llama.cpp's converter can write its GGUF file."""
    was_refused: bool
    """A worker has refused it since it was created or last claimed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportClaim:
    """An export that this worker makes."""

    claim_id: str
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


def claim(
    db: Database,
    *,
    worker_id: str,
    lease_seconds: float,
    refuse: Callable[[WaitingExport], LorryError | None] = lambda _: None,
) -> ExportClaim | None:
    """Lease a waiting export to this worker. Returns None if none waits that it can make.

    refuse: returns why this worker can't make an export, or None. A refusal counts as no attempt: for REFUSAL_SECONDS,
    only other workers may take the export. It fails if no worker has taken it MAX_WAIT_SECONDS after the first refusal,
    or if MAX_ATTEMPTS workers were lost.
    """
    for _ in range(MAX_READS):
        for each in _waiting(db, worker_id):
            error = None if each.num_attempts >= MAX_ATTEMPTS else refuse(each)
            with db.write() as session:
                now = serialized_at(session, "take an export")
                own = export_rows.waiting(now=now).where(AdapterExport.id == each.export_id)
                row, worker = session.scalar(own.with_for_update()), session.get(Worker, worker_id)
                if row is None or (worker is not None and worker.takes_nothing_new):
                    continue
                if row.num_attempts >= MAX_ATTEMPTS:
                    _fail(row, _lost(row), now=now)
                elif error is not None:
                    _refuse(row, worker_id, error, now=now, lease_seconds=lease_seconds)
                elif _in_order(session, worker_id, now=now)[:1] == [row.id]:
                    return _claim(session, row, now=now, lease_seconds=lease_seconds)
                else:
                    break
        else:
            return None
    return None


def finish(db: Database, claim_id: str, exported: ExportResult) -> None:
    """Record the result, and charge its bytes to the project. Raises StaleClaim, QuotaExceeded."""
    with db.write() as session:
        row, now = _hold(session, claim_id), read_clock(session)
        if exported.manifest is not None:
            num_bytes = exported.manifest.num_bytes
            quota.check_stored(session, row.project_id, num_bytes, now=now, is_finished_export=True)
            row.artifact = artifact_index.show(session, exported.manifest, now=now)
            row.num_bytes = num_bytes
            ledger.store(session, row.project_id, row.num_bytes, now=now)
        row.verification, row.cost, row.hub_url = exported.verification, exported.cost, exported.hub_url
        row.status, row.finished_at, row.error = "succeeded", now, None
        lease.release(row)


def fail(db: Database, claim_id: str, error: LorryError) -> None:
    """Mark the export as failed: the same attempt would fail again. Raises StaleClaim."""
    with db.write() as session:
        _fail(_hold(session, claim_id), _described(error), now=read_clock(session))


def release(db: Database, claim_id: str, *, error: LorryError | None = None, wait_seconds: float = 0) -> None:
    """Release the export, so that this or another worker makes it. Raises StaleClaim.

    error: the export may be the cause, so the attempt counts, and the last one fails with it. None: it does not count,
    because the worker exits or the store does not answer.
    """
    with db.write() as session:
        row, now = _hold(session, claim_id), read_clock(session)
        if error is not None and row.num_attempts >= MAX_ATTEMPTS:
            _fail(row, _described(error), now=now)
            return
        row.num_attempts -= error is None
        row.status, row.run_after = "queued", now + wait_seconds
        lease.release(row)


def _waiting(db: Database, worker_id: str) -> list[WaitingExport]:
    """Return the exports that this worker may take, in order. A read transaction blocks no writer."""
    with db.read() as session:
        now = read_clock(session)
        worker = session.get(Worker, worker_id)
        if worker is not None and worker.takes_nothing_new:
            return []
        asked = _in_order(session, worker_id, now=now)[:MAX_LOOKED_AT]
        rows = (session.get(AdapterExport, ident) for ident in asked)
        return [_shown(session, row) for row in rows if row is not None]


def _in_order(session: Session, worker_id: str, *, now: float) -> list[str]:
    """Return the ids of the waiting exports that this worker has not just refused, the next one first."""
    found = session.execute(export_rows.waiting(now=now).with_only_columns(AdapterExport.id, AdapterExport.refusals))
    return [ident for ident, refusals in found if worker_id not in _refusing(refusals, now=now)]


def _shown(session: Session, row: AdapterExport) -> WaitingExport:
    description: Json = session.get_one(BaseModelRow, row.base_model).description or {}
    artifact = session.get(Artifact, row.adapter_artifact)
    return WaitingExport(
        export_id=row.id,
        num_attempts=row.num_attempts,
        adapter_bytes=0 if artifact is None else artifact.num_bytes,
        needs=formats.needs(row.format, row.quantization, description=description, stored_bytes=row.expected_bytes),
        needs_converter=row.format == "gguf" and not formats.is_written_by_lorry(description),
        was_refused=row.refusals is not None,
    )


def _refusing(refusals: Json | None, *, now: float) -> dict[str, float]:
    """Return the workers that have just refused the export, each with the time."""
    workers: dict[str, float] = {} if refusals is None else refusals["workers"]
    return {worker_id: at for worker_id, at in workers.items() if at > now - REFUSAL_SECONDS}


def _refuse(row: AdapterExport, worker_id: str, error: LorryError, *, now: float, lease_seconds: float) -> None:
    since = now if row.refusals is None else float(row.refusals["since"])
    row.refusals = {"since": since, "workers": {**_refusing(row.refusals, now=now), worker_id: now}}
    if row.lease_expires_at is not None and row.lease_expires_at > now - lease_seconds:
        return  # another worker makes it, and may still renew its lease
    row.error = _described(error)
    row.status = "queued"  # a worker that was lost may have left it running
    lease.release(row)
    if since <= now - MAX_WAIT_SECONDS:
        message = f"{error.message} No worker has taken the export for {(now - since) / 3600:.0f} hours."
        remedy = f"{error.remedy} Then create the export again."
        _fail(row, {"code": error.code, "message": message, "remedy": remedy}, now=now)


def _claim(session: Session, row: AdapterExport, *, now: float, lease_seconds: float) -> ExportClaim:
    model = session.get(Adapter, row.adapter_id) or session.get(Checkpoint, row.adapter_id)
    row.num_attempts += 1
    row.status, row.started_at, row.run_after = "running", row.started_at or now, None
    row.error = row.refusals = None
    return ExportClaim(
        claim_id=lease.acquire(row, now=now, lease_seconds=lease_seconds, prefix="exporting"),
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


def _hold(session: Session, claim_id: str) -> AdapterExport:
    row = lease.held(session, AdapterExport, claim_id)
    if row is None:
        raise StaleClaim(claim_id)
    return row


def _fail(row: AdapterExport, error: Json, *, now: float) -> None:
    row.status, row.error, row.finished_at = "failed", error, now
    lease.release(row)


def _described(error: LorryError) -> Json:
    return {"code": error.code, "message": error.message, "remedy": error.remedy}


def _lost(row: AdapterExport) -> Json:
    return {
        "code": "export_lost",
        "message": f"The export failed: {row.num_attempts} workers were lost while they made it.",
        "remedy": "Check the logs of the workers. They may run out of memory: a worker needs memory for the merged "
        "model in 32 bits. Then create the export again.",
    }
