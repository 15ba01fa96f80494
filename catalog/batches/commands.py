"""User commands on batches: create, list, show and cancel. Batches of other projects raise NotFound."""

from __future__ import annotations

from typing import Literal

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from catalog.audit import log
from catalog.audit.log import AuditType
from catalog.caller import Caller
from catalog.db.database import Database, read_clock, serialize
from catalog.db.pagination import Page, paginate
from catalog.errors import Conflict, InvalidRequest, NotFound, RateLimited
from catalog.storage import files
from catalog.tables.serving import Batch
from catalog.tables.storage import File
from catalog.tables.table import new_id
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskKind
from catalog.tenancy import authentication

Endpoint = Literal["/v1/chat/completions", "/v1/completions"]
BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
CANCELLABLE = ("validating", "in_progress")
WINDOW_SECONDS = 24 * 3600.0
"""Time within which a batch must be completed. After it, the batch expires."""
MAX_OPEN_BATCHES = 100
"""Maximum number of unfinished batches of a project."""
RETRY_SECONDS = 600.0
"""A client's retry returns an equal batch that is at most this old, instead of creating another one."""


def create(
    db: Database,
    *,
    caller: Caller,
    input_file: str,
    endpoint: Endpoint,
    labels: dict[str, str] | None = None,
    lifetime_seconds: int | None = None,
    is_client_retry: bool = False,
) -> Batch:
    """Create a batch. Its lines are checked later: if one is invalid, the batch fails.

    lifetime_seconds: of its output files. is_client_retry: the client repeats a request that had no reply. Raises
    NotFound, InvalidRequest for a file with another purpose, and RateLimited.
    """
    with db.write() as session:
        serialize(session, f"batches {caller.project_id}")
        now = read_clock(session)
        authentication.check_valid(session, caller.api_key_id, now=now)
        if is_client_retry and (earlier := _earlier(session, caller, input_file, endpoint, labels, now=now)):
            return earlier
        file = _input(session, caller.project_id, input_file, now=now)
        _check_open(session, caller)
        batch = Batch(
            id=new_id("batch"),
            project_id=caller.project_id,
            created_at=now,
            created_by=caller.api_key_id,
            endpoint=endpoint,
            input_file=file.id,
            labels=labels,
            lifetime_seconds=lifetime_seconds,
            status="validating",
            expires_at=now + WINDOW_SECONDS,
        )
        session.add(batch)
        task_queue.add(session, TaskKind.BATCH, batch.id, project_id=batch.project_id, run_after=now)
        _note(session, "batch.created", batch, now=now)
        return batch


def get(db: Database, *, project_id: str, batch_id: str) -> Batch:
    """Return the batch. Raises NotFound."""
    with db.read() as session:
        return _find(session, project_id, batch_id)


def list_page(db: Database, *, project_id: str, after: str | None = None, limit: int = 20) -> Page[Batch]:
    """Return a page of the project's batches, newest first."""
    scope = select(Batch).where(Batch.project_id == project_id)
    with db.read() as session:
        return paginate(session, scope, created=Batch.created_at, ident=Batch.id, after=after, limit=limit)


def cancel(db: Database, *, project_id: str, batch_id: str) -> Batch:
    """Cancel the batch: the API process that works on it stops soon, and stores the answers so far.

    A batch that is cancelled already is returned unchanged. Raises NotFound, and Conflict if the batch has ended.
    """
    with db.write() as session:
        batch = _find(session, project_id, batch_id, locked=True)
        if batch.status in ("cancelling", "cancelled"):
            return batch
        if batch.status not in CANCELLABLE:
            raise Conflict("batch_finished", batch=batch.id, state=batch.status, param="batch_id")
        request_cancel(session, batch, now=read_clock(session))
        return batch


def request_cancel(session: Session, batch: Batch, *, now: float) -> None:
    """Cancel a batch whose status is one of CANCELLABLE. Its row is locked."""
    batch.status, batch.cancelling_at = "cancelling", now
    _note(session, "batch.cancelled", batch, now=now)


def _find(session: Session, project_id: str, batch_id: str, *, locked: bool = False) -> Batch:
    own: Select[Batch] = select(Batch).where(Batch.id == batch_id, Batch.project_id == project_id)
    batch = session.scalar(own.with_for_update() if locked else own)
    if batch is None:
        raise NotFound("batch_not_found", batch_id=batch_id, param="batch_id")
    return batch


def _earlier(
    session: Session, caller: Caller, input_file: str, endpoint: str, labels: dict[str, str] | None, *, now: float
) -> Batch | None:
    """Return the batch that the first attempt of this request created, if there is one."""
    same = (
        Batch.project_id == caller.project_id,
        Batch.created_by == caller.api_key_id,
        Batch.input_file == input_file,
        Batch.endpoint == endpoint,
        Batch.created_at > now - RETRY_SECONDS,
    )
    found = session.scalar(select(Batch).where(*same).order_by(Batch.created_at.desc()).limit(1))
    return found if found is not None and found.labels == labels else None


def _input(session: Session, project_id: str, file_id: str, *, now: float) -> File:
    """Return the input file, locked. Raises NotFound, and InvalidRequest if a batch can't read it."""
    try:
        file = files.find(session, project_id=project_id, file_id=file_id, lock=True)
    except NotFound as error:
        error.param = "input_file_id"
        raise
    if file.purpose != files.BATCH:
        raise InvalidRequest("wrong_purpose_for_batch", file=file.id, purpose=file.purpose, param="input_file_id")
    if files.has_expired(file, now=now):
        raise InvalidRequest("file_expired", file=file.id, param="input_file_id")
    return file


def _check_open(session: Session, caller: Caller) -> None:
    own = (Batch.project_id == caller.project_id, Batch.finished_at.is_(None))
    if (session.scalar(select(func.count()).where(*own)) or 0) >= MAX_OPEN_BATCHES:
        raise RateLimited("too_many_batches", max_open_batches=MAX_OPEN_BATCHES, retry_after_seconds=60, headers={})


def _note(session: Session, type: AuditType, batch: Batch, *, now: float) -> None:  # noqa: A002
    details = {"endpoint": batch.endpoint, "input_file_id": batch.input_file}
    log.note(session, type, now=now, object_id=batch.id, project_id=batch.project_id, details=details)
