"""Uploaded files: a row with owner, time and metadata, and a blob of the store with the bytes.

A file is visible once its row is committed. If the row can't be written, garbage collection deletes the blob later.
It is not deleted here, because another upload of the same bytes may already rely on it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from sqlalchemy import ColumnElement, and_, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from catalog.audit import log
from catalog.audit.log import AuditType
from catalog.datasets import check_process, validator
from catalog.datasets.validator import DatasetCheck
from catalog.db.database import Database, read_clock
from catalog.db.pagination import Order, Page, paginate
from catalog.errors import NUM_NAMED, Conflict, InvalidRequest, NotFound, TooLarge, Unavailable, listed
from catalog.settings import Settings
from catalog.states import UNFINISHED_STATES
from catalog.storage import quota
from catalog.storage.store import ArtifactStore, Blob
from catalog.tables.jobs import Job, Sweep
from catalog.tables.serving import Batch
from catalog.tables.storage import File
from catalog.tables.table import Json, new_id
from catalog.usage import ledger

DATASET = "fine-tune"
"""Purpose of training and validation files. Only these are checked, and jobs can use only these."""
USER_DATA = "user_data"
BATCH = "batch"
"""Purpose of the input files of batches, which are checked when a batch begins."""
BATCH_OUTPUT = "batch_output"
"""Purpose of the output files of batches, which only the service creates."""
PURPOSES = (DATASET, USER_DATA, BATCH)
"""Purposes that can be uploaded, a subset of those that OpenAI's client knows in responses."""
SHORT_BYTES = 2**16
"""Data sets up to this size are checked in this process, which takes some hundredths of a second."""
MAX_NAME_CHARS = 200
LIFETIME_SECONDS = (3600, 30 * 24 * 3600)
"""Minimum and maximum of `expires_after`, as in OpenAI's API."""


def create(
    db: Database,
    store: ArtifactStore,
    *,
    project_id: str,
    purpose: str,
    filename: str,
    spooled: Path,
    num_bytes: int,
    digest: str,
    lifetime_seconds: int | None = None,
    settings: Settings,
    is_abandoned: Callable[[], bool] = lambda: False,
) -> File:
    """Check and store the bytes in `spooled`, and insert the file's row. The caller deletes `spooled`.

    num_bytes and digest (sha256, hex) describe the uploaded bytes. lifetime_seconds is within LIFETIME_SECONDS. The
    check stops once is_abandoned returns True. Raises InvalidRequest, TooLarge, OutOfSpace and Unavailable; then no
    file is created.
    """
    content = Blob(digest=digest, num_bytes=num_bytes)
    with db.read() as session:  # bytes beyond the quota are rejected before they are stored
        quota.precheck_stored(session, project_id, num_bytes, now=read_clock(session))
    file = stored(
        store,
        project_id=project_id,
        purpose=purpose,
        filename=filename,
        spooled=spooled,
        content=content,
        settings=settings,
        is_abandoned=is_abandoned,
    )
    with db.write() as session:
        return show(session, file, lifetime_seconds=lifetime_seconds)


def stored(
    store: ArtifactStore,
    *,
    project_id: str,
    purpose: str,
    filename: str,
    spooled: Path,
    content: Blob,
    settings: Settings,
    is_abandoned: Callable[[], bool] = lambda: False,
) -> File:
    """Check and store the bytes in `spooled`. Returns the file's row, which is not visible before `show`.

    content: digest and size of the uploaded bytes. Raises the same errors as `create`, except QuotaExceeded.
    """
    check_purpose(purpose)
    check_size(content.num_bytes, settings, filename=filename, purpose=purpose)
    check = _inspect(spooled, content.num_bytes, settings, is_abandoned) if purpose == DATASET else None
    put(store, spooled, content)
    return File(
        id=new_id("file"),
        project_id=project_id,
        purpose=purpose,
        filename=label(filename),
        num_bytes=content.num_bytes,
        num_rows=check.num_rows if check else None,
        kind=check.kind if check else None,
        digest=content.digest,
    )


def put(store: ArtifactStore, spooled: Path, content: Blob) -> None:
    """Store the bytes in `spooled`, which must match `content`. Raises Unavailable, OutOfSpace."""
    stored_content = store.put_file(spooled)
    if stored_content != content:
        raise Unavailable("upload_damaged", digest=stored_content.digest, wanted_digest=content.digest)


def show(session: Session, file: File, *, lifetime_seconds: int | None) -> File:
    """Insert the file's row, which makes the file visible. Raises QuotaExceeded."""
    file.created_at = read_clock(session)
    file.expires_at = None if lifetime_seconds is None else file.created_at + lifetime_seconds
    quota.check_stored(session, file.project_id, file.num_bytes, now=file.created_at)
    session.add(file)
    ledger.store(session, file.project_id, file.num_bytes, now=file.created_at)
    details = {"filename": file.filename, "purpose": file.purpose, "bytes": file.num_bytes, "digest": file.digest}
    _note(session, "file.created", file, now=file.created_at, details=details)
    return file


def same_content(db: Database, file: File) -> str | None:
    """Return the id of the project's earliest other file with the same bytes and purpose, or None."""
    with db.read() as session:
        others = select(File.id).where(File.project_id == file.project_id, File.digest == file.digest)
        others = others.where(File.purpose == file.purpose, File.id != file.id, is_visible(read_clock(session)))
        return session.scalar(others.order_by(File.created_at, File.id).limit(1))


def get(db: Database, *, project_id: str, file_id: str) -> File:
    """Return the file. Raises NotFound, also for deleted and expired files and for those of other projects."""
    with db.read() as session:
        return find(session, project_id=project_id, file_id=file_id)


def list_page(
    db: Database,
    *,
    project_id: str,
    after: str | None = None,
    limit: int = 20,
    order: Order = "desc",
    purpose: str | None = None,
) -> Page[File]:
    """Return a page of the project's files by time of upload. Raises InvalidRequest for an unknown cursor."""
    scope = select(File).where(File.project_id == project_id)
    of_purpose = () if purpose is None else (File.purpose == purpose,)
    with db.read() as session:
        return paginate(
            session,
            scope,
            created=File.created_at,
            ident=File.id,
            after=after,
            limit=limit,
            order=order,
            visible=(is_visible(read_clock(session)), *of_purpose),
        )


def delete(db: Database, *, project_id: str, file_id: str, is_client_retry: bool = False) -> File:
    """Hide the file. Raises Conflict while an unfinished job, sweep or batch uses it.

    Its row stays, because records of the jobs that used it refer to it. is_client_retry: the client repeats a request
    that had no reply; a file that is deleted already is then returned.
    """
    with db.write() as session:
        file = find(session, project_id=project_id, file_id=file_id, lock=True, include_deleted=is_client_retry)
        if file.deleted_at is not None:
            return file
        if users := _users(session, file_id):
            raise _in_use(file_id, users)
        file.deleted_at = now = read_clock(session)
        ledger.store(session, file.project_id, -file.num_bytes, now=now)
        _note(session, "file.deleted", file, now=now, details={"filename": file.filename})
    return file


def find(session: Session, *, project_id: str, file_id: str, lock: bool = False, include_deleted: bool = False) -> File:
    """Return the row. `lock` blocks the creation of jobs that use it until the transaction ends. Raises NotFound."""
    statement = select(File).where(File.id == file_id, File.project_id == project_id)
    if not include_deleted:
        statement = statement.where(is_visible(read_clock(session)))
    file = session.scalar(statement.with_for_update() if lock else statement)
    if file is None:
        raise NotFound("file_not_found", file_id=file_id, param="file_id")
    return file


def is_visible(now: float) -> ColumnElement[bool]:
    """In a query: the file is not deleted, and it has not expired or unfinished work uses it (`is_read`)."""
    return and_(File.deleted_at.is_(None), or_(File.expires_at.is_(None), File.expires_at > now, is_read()))


def is_read() -> ColumnElement[bool]:
    """In a query: an unfinished job or batch uses the file, or a sweep uses it that has trials left to create."""
    unfinished = select(Job.id).where(Job.state.in_(UNFINISHED_STATES))  # few, found by an index
    trains, checks = unfinished.where(Job.training_file == File.id), unfinished.where(Job.validation_file == File.id)
    batches = select(Batch.id).where(Batch.finished_at.is_(None), Batch.input_file == File.id)
    sweeps = select(Sweep.id).where(_makes_trials(), _of_sweep(File.id))
    return or_(trains.exists(), checks.exists(), sweeps.exists(), batches.exists())


def _makes_trials() -> ColumnElement[bool]:
    return and_(Sweep.finished_at.is_(None), Sweep.is_closed.is_(False), Sweep.num_created < Sweep.num_trials)


def _of_sweep(file_id: str | InstrumentedAttribute[str]) -> ColumnElement[bool]:
    return or_(Sweep.training_file == file_id, Sweep.validation_file == file_id)


def _users(session: Session, file_id: str) -> list[str]:
    """Return what uses the file: the first unfinished sweeps, jobs and batches of an error, and one more of each."""
    of_file = or_(Job.training_file == file_id, Job.validation_file == file_id)
    jobs = select(Job.id).where(of_file, Job.state.in_(UNFINISHED_STATES)).order_by(Job.created_at, Job.id)
    sweeps = select(Sweep.id).where(_makes_trials(), _of_sweep(file_id)).order_by(Sweep.created_at, Sweep.id)
    of_batches = (Batch.input_file == file_id, Batch.finished_at.is_(None))
    batches = select(Batch.id).where(*of_batches).order_by(Batch.created_at, Batch.id)
    found = [f"sweep {ident}" for ident in session.scalars(sweeps.limit(NUM_NAMED + 1))]
    found += [f"job {ident}" for ident in session.scalars(jobs.limit(NUM_NAMED + 1))]
    return found + [f"batch {ident}" for ident in session.scalars(batches.limit(NUM_NAMED + 1))]


def _in_use(file_id: str, users: Sequence[str]) -> Conflict:
    is_one, user = len(users) == 1, users[0]
    named = listed([*users[:NUM_NAMED], *(["others"] if len(users) > NUM_NAMED else [])])
    if is_one:
        return Conflict("file_in_use", file_id=file_id, user=user, param="file_id")
    return Conflict("file_in_use_by_several", file_id=file_id, named=named, param="file_id")


def has_expired(file: File, *, now: float) -> bool:
    """Return whether the file has expired. New jobs can't use it then, even while an earlier job still does."""
    return file.expires_at is not None and file.expires_at <= now


def label(filename: str) -> str:
    """Return the last part of the path, without characters that a terminal would interpret."""
    name = PurePosixPath(filename.replace("\\", "/")).name
    plain = "".join("_" if unicodedata.category(char)[0] == "C" else char for char in name).strip()
    return plain[:MAX_NAME_CHARS] if plain.strip(".") else "file"


def check_purpose(purpose: str) -> None:
    if purpose not in PURPOSES:
        raise InvalidRequest("invalid_purpose", purpose=purpose[:40], param="purpose")


def check_size(num_bytes: int, settings: Settings, *, filename: str, purpose: str, param: str = "file") -> None:
    name = label(filename)
    if num_bytes > settings.max_file_bytes:
        raise TooLarge(
            "content_too_large", name=name, num_bytes=num_bytes, max_file_bytes=settings.max_file_bytes, param=param
        )
    if num_bytes == 0:
        raise InvalidRequest("rows_file_empty" if purpose == DATASET else "file_empty", name=name, param=param)


def _note(session: Session, type: AuditType, file: File, *, now: float, details: Json) -> None:  # noqa: A002
    log.note(session, type, now=now, object_id=file.id, project_id=file.project_id, details=details)


def _inspect(spooled: Path, num_bytes: int, settings: Settings, is_abandoned: Callable[[], bool]) -> DatasetCheck:
    """Check a data set: a short one in this process, because starting another one takes longer than the check."""
    limits = {"max_line_bytes": settings.max_line_bytes, "max_rows": settings.max_rows}
    if num_bytes > SHORT_BYTES:
        return check_process.inspect(spooled, **limits, is_abandoned=is_abandoned)
    with spooled.open("rb") as lines:
        return validator.inspect(lines, **limits)
