"""Multipart uploads: the client creates an upload, sends its parts one by one, and completes it to create the file.

Clients may repeat every request. Equal bytes are the same part, and an upload results in at most one file. A repeated
create request creates a second upload, which expires after an hour without parts.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import and_, case, delete, func, or_, select, update
from sqlalchemy.orm import Session

from catalog.audit import log
from catalog.datasets.check_process import CheckCrashed, CheckStopped
from catalog.db.database import Database, read_clock, serialize
from catalog.disk import full_disk_named
from catalog.errors import (
    Conflict,
    InvalidRequest,
    LorryError,
    NotFound,
    OutOfSpace,
    QuotaExceeded,
    TooLarge,
    Unavailable,
)
from catalog.settings import Settings
from catalog.storage import files
from catalog.storage import quota as stored_quota
from catalog.storage.store import ArtifactStore, Blob
from catalog.tables.storage import COUNTED, File, Upload, UploadPart
from catalog.tables.table import new_id
from catalog.usage import quotas
from catalog.usage.ledger import DAY_SECONDS

MAX_PART_BYTES = 64 * 2**20
"""OpenAI's limit, and the size of the parts that its client sends."""
MAX_PARTS = 10_000
OPEN_SECONDS = 3600.0
"""How long an upload accepts parts, as in OpenAI's API."""
KEPT_SECONDS = 24 * 3600.0
"""How long after its expiration the row of an upload is kept."""
SPARE_BYTES = 2**20
"""The parts of an upload may always have this many bytes, or twice the announced size if that is more. A client may
send the same file again in parts of another size."""
JOIN_LEASE_SECONDS = 900.0
MAX_COMPLETIONS = 10
"""Maximum number of failed completions of one upload."""
Status = Literal["pending", "completed", "cancelled", "expired"]
OpenLimit = Literal["open_uploads", "open_upload_bytes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class UploadView:
    """An upload with its current status; `file` is set once it is completed."""

    upload: Upload
    status: Status
    file: File | None = None


def create(
    db: Database,
    *,
    project_id: str,
    purpose: str,
    filename: str,
    num_bytes: int,
    lifetime_seconds: int | None,
    settings: Settings,
) -> UploadView:
    """Create an upload for a file of `num_bytes`. Raises InvalidRequest and TooLarge where completing it would, and
    QuotaExceeded."""
    files.check_purpose(purpose)
    files.check_size(num_bytes, settings, filename=filename, purpose=purpose, param="bytes")
    with db.write() as session:
        now = read_clock(session)
        _check_open_ones(session, project_id, num_bytes, settings, now=now)
        stored_quota.check_stored(session, project_id, num_bytes, now=now)
        upload = Upload(
            id=new_id("upload"),
            project_id=project_id,
            purpose=purpose,
            filename=files.label(filename),
            num_bytes=num_bytes,
            part_bytes=0,
            lifetime_seconds=lifetime_seconds,
            created_at=now,
            expires_at=now + OPEN_SECONDS,
        )
        session.add(upload)
        _note(session, "upload.created", upload, now=now)
    return UploadView(upload=upload, status="pending")


def check_open(db: Database, *, project_id: str, upload_id: str) -> None:
    """Raises NotFound, and Conflict for an upload that accepts no more parts."""
    with db.read() as session:
        _open(session, project_id, upload_id)


def add_part(
    db: Database,
    store: ArtifactStore,
    *,
    project_id: str,
    upload_id: str,
    spooled: Path,
    content: Blob,
    settings: Settings,
) -> UploadPart:
    """Store the bytes in `spooled` as a part. The caller deletes `spooled`.

    content: digest and size of the uploaded bytes. Raises the same errors as check_open, and InvalidRequest, TooLarge,
    OutOfSpace and Unavailable.
    """
    with db.read() as session:  # a part that can't be added is rejected before it is stored
        _check_addable(session, _open(session, project_id, upload_id), content, settings)
    files.put(store, spooled, content)
    return record_part(db, project_id=project_id, upload_id=upload_id, content=content, settings=settings)


def record_part(db: Database, *, project_id: str, upload_id: str, content: Blob, settings: Settings) -> UploadPart:
    """Insert the row of a part whose content is stored. Returns the existing part if the upload has these bytes."""
    with db.write() as session:
        upload = _open(session, project_id, upload_id, lock=True)
        existing = _check_addable(session, upload, content, settings)
        if existing is not None:
            return existing
        part = UploadPart(id=new_id("part"), upload_id=upload.id, num_bytes=content.num_bytes, digest=content.digest)
        part.created_at = read_clock(session)
        upload.part_bytes += part.num_bytes
        session.add(part)
        return part


def _check_addable(session: Session, upload: Upload, content: Blob, settings: Settings) -> UploadPart | None:
    """Return the upload's part with these bytes, or None. Raises InvalidRequest and TooLarge if they can't be added."""
    if content.num_bytes == 0:
        raise InvalidRequest("part_empty", upload=upload.id, param="data")
    of_upload = select(UploadPart).where(UploadPart.upload_id == upload.id)
    existing = session.scalar(of_upload.where(UploadPart.digest == content.digest))
    if existing is None:
        _check_size(session, upload, content, settings)
    return existing


def complete(
    db: Database,
    store: ArtifactStore,
    *,
    project_id: str,
    upload_id: str,
    part_ids: Sequence[str],
    md5: str | None,
    folder: Path,
    settings: Settings,
    is_client_retry: bool = False,
    is_abandoned: Callable[[], bool] = lambda: False,
) -> UploadView:
    """Join the parts in the given order in a file in `folder`, check it as any upload, and create the file.

    md5: of the joined file, in hex. The check stops once is_abandoned returns True. is_client_retry: the client repeats
    a request that had no reply; a completed upload is then returned. Raises the same errors as files.create, NotFound,
    and Conflict for an upload that is over or whose completion has failed MAX_COMPLETIONS times.
    """
    with db.write() as session:
        upload = _find(session, project_id, upload_id, lock=True)
        if is_client_retry and upload.file_id is not None:
            return _completed(session, upload)
        now = read_clock(session)
        _check_open(upload, now=now)
        parts = _named(session, upload, part_ids)
        stored_quota.check_stored(session, project_id, upload.num_bytes, now=now)  # rejects before bytes are stored
        _check_completions(upload)
        _lease(upload, now=now)
    try:
        file = _whole_file(store, upload, parts, md5=md5, folder=folder, settings=settings, is_abandoned=is_abandoned)
        with db.write() as session:
            upload = _find(session, project_id, upload_id, lock=True)
            if is_client_retry and upload.file_id is not None:  # a retry after the lease was faster
                return _completed(session, upload)
            _check_not_over(upload)
            files.show(session, file, lifetime_seconds=upload.lifetime_seconds)
            session.flush()  # inserts the file's row first, because the upload refers to it
            upload.file_id, upload.completing_until = file.id, None
            if file.digest in {part.digest for part in parts}:  # a single part: its bytes now count as the file's
                upload.part_bytes -= upload.num_bytes
            return UploadView(upload=upload, status="completed", file=file)
    except LorryError as error:
        _end_lease(db, upload_id, is_counted=not _is_of_the_service(error))
        raise


def _whole_file(
    store: ArtifactStore,
    upload: Upload,
    parts: Sequence[UploadPart],
    *,
    md5: str | None,
    folder: Path,
    settings: Settings,
    is_abandoned: Callable[[], bool],
) -> File:
    """Join, check and store the parts. Returns the file's row, which is not visible yet."""
    with assembled(store, parts, folder) as whole:
        _check_md5(upload.id, whole.md5, md5)
        return files.stored(
            store,
            project_id=upload.project_id,
            purpose=upload.purpose,
            filename=upload.filename,
            spooled=whole.path,
            content=whole.content,
            settings=settings,
            is_abandoned=is_abandoned,
        )


def _check_completions(upload: Upload) -> None:
    """Raises Conflict after too many completions, each of which joins and checks the whole file again."""
    if upload.num_completions >= MAX_COMPLETIONS:
        raise Conflict("too_many_completions", upload=upload.id, max_completions=MAX_COMPLETIONS)


def _is_of_the_service(error: LorryError) -> bool:
    """Return whether the service caused the error rather than the upload. A client that disconnects is no failure of
    the service. Neither is a check that crashed, because the file may need more memory than is available."""
    return isinstance(error, Unavailable | OutOfSpace) and not isinstance(error, CheckStopped | CheckCrashed)


def _lease(upload: Upload, *, now: float) -> None:
    """Lease the upload, so that no other request joins its parts at the same time. Raises Unavailable if one does."""
    if upload.completing_until is not None and upload.completing_until > now:
        raise Unavailable("upload_completing", upload=upload.id)
    upload.completing_until = now + JOIN_LEASE_SECONDS
    upload.num_completions += 1


def _end_lease(db: Database, upload_id: str, *, is_counted: bool) -> None:
    """End the lease of a failed completion, so that a client can retry at once. If this can't be written, the client
    can retry once the lease has expired. is_counted: the failure counts toward MAX_COMPLETIONS."""
    values: dict[str, Any] = {"completing_until": None}
    if not is_counted:
        values["num_completions"] = Upload.num_completions - 1
    with suppress(LorryError), db.write() as session:
        session.execute(update(Upload).where(Upload.id == upload_id).values(values))


def cancel(db: Database, *, project_id: str, upload_id: str, is_client_retry: bool = False) -> UploadView:
    """Cancel the upload. An expired upload stays expired. A repeated request has the same response as the first."""
    with db.write() as session:
        upload = _find(session, project_id, upload_id, lock=True)
        now = read_clock(session)
        if not (is_client_retry and upload.cancelled_at is not None):
            _check_not_over(upload)
        if status(upload, now=now) == "pending":
            upload.cancelled_at = now
            _note(session, "upload.cancelled", upload, now=now)
        return UploadView(upload=upload, status=status(upload, now=now))


def forget(session: Session, *, now: float) -> None:
    """Delete the parts of uploads that are over, and the uploads themselves KEPT_SECONDS after their expiration. By
    then the blobs of their parts are old enough that this run of garbage collection deletes them."""
    ended = or_(Upload.file_id.is_not(None), Upload.cancelled_at.is_not(None), Upload.expires_at <= now)
    session.execute(delete(UploadPart).where(UploadPart.upload_id.in_(select(Upload.id).where(ended))))
    session.execute(delete(Upload).where(Upload.expires_at <= now - KEPT_SECONDS))


def status(upload: Upload, *, now: float) -> Status:
    if upload.file_id is not None:
        return "completed"
    if upload.cancelled_at is not None:
        return "cancelled"
    return "expired" if upload.expires_at <= now else "pending"


def _note(
    session: Session,
    type: Literal["upload.created", "upload.cancelled"],  # noqa: A002
    upload: Upload,
    *,
    now: float,
) -> None:
    details = {"filename": upload.filename, "purpose": upload.purpose, "bytes": upload.num_bytes}
    log.note(session, type, now=now, object_id=upload.id, project_id=upload.project_id, details=details)


def _open(session: Session, project_id: str, upload_id: str, *, lock: bool = False) -> Upload:
    upload = _find(session, project_id, upload_id, lock=lock)
    _check_open(upload, now=read_clock(session))
    return upload


def _find(session: Session, project_id: str, upload_id: str, *, lock: bool = False) -> Upload:
    owned = select(Upload).where(Upload.id == upload_id, Upload.project_id == project_id)
    upload = session.scalar(owned.with_for_update() if lock else owned)
    if upload is None:
        raise NotFound("upload_not_found", upload_id=upload_id, param="upload_id")
    return upload


def _completed(session: Session, upload: Upload) -> UploadView:
    return UploadView(upload=upload, status="completed", file=session.get_one(File, upload.file_id))


def _check_open(upload: Upload, *, now: float) -> None:
    _check_not_over(upload)
    if status(upload, now=now) == "expired":
        raise Conflict("upload_expired", upload=upload.id, param="upload_id")


def _check_not_over(upload: Upload) -> None:
    if upload.file_id is not None:
        raise Conflict("upload_completed", upload=upload.id, file_id=upload.file_id, param="upload_id")
    if upload.cancelled_at is not None:
        raise Conflict("upload_cancelled", upload=upload.id, param="upload_id")


def _check_open_ones(session: Session, project_id: str, num_bytes: int, settings: Settings, *, now: float) -> None:
    """Raises QuotaExceeded if another upload would exceed the project's number or bytes of open uploads.

    Announced bytes count while an upload is open. Bytes of parts count until they are deleted from the store.
    """
    serialize(session, f"uploads {project_id}")
    is_open = and_(Upload.file_id.is_(None), Upload.cancelled_at.is_(None), Upload.expires_at > now)
    num_bytes_of = case(
        (and_(is_open, Upload.num_bytes > Upload.part_bytes), Upload.num_bytes), else_=Upload.part_bytes
    )
    sums = select(func.count().filter(is_open), func.coalesce(func.sum(num_bytes_of), 0))
    count, total_bytes = session.execute(sums.where(Upload.project_id == project_id, COUNTED)).one()
    maximum = settings.max_open_uploads
    if count + 1 > maximum:
        raise _too_many(session, project_id, "open_uploads", used=count, more=1, maximum=maximum, now=now)
    maximum = settings.max_open_upload_bytes
    if total_bytes + num_bytes > maximum:
        raise _too_many(
            session, project_id, "open_upload_bytes", used=int(total_bytes), more=num_bytes, maximum=maximum, now=now
        )


def _too_many(
    session: Session, project_id: str, name: OpenLimit, *, used: int, more: int, maximum: int, now: float
) -> QuotaExceeded:
    counted = session.scalars(select(Upload).where(Upload.project_id == project_id, COUNTED))
    leaving = [one for upload in counted for one in _leaving(upload, name, now=now)]
    free_at = quotas.enough_at(leaving, used + more - maximum, now=now)
    project = quotas.project_of(session, project_id).name
    if name == "open_uploads":
        return QuotaExceeded(
            "too_many_open_uploads",
            project=project,
            used=used,
            maximum=maximum,
            retry_after_seconds=math.inf if free_at is None else free_at - now,
            quota={
                "name": name,
                "limit": maximum,
                "used": used,
                "resets_at": None if free_at is None else int(free_at),
            },
        )
    if more > maximum:
        return QuotaExceeded(
            "upload_larger_than_quota",
            bytes=quotas.counted(more, "byte"),
            project=project,
            used=used,
            maximum=maximum,
            retry_after_seconds=math.inf if free_at is None else free_at - now,
            quota={
                "name": name,
                "limit": maximum,
                "used": used,
                "resets_at": None if free_at is None else int(free_at),
            },
        )
    return QuotaExceeded(
        "too_many_open_upload_bytes",
        bytes=quotas.counted(more, "byte"),
        project=project,
        used=used,
        maximum=maximum,
        retry_after_seconds=math.inf if free_at is None else free_at - now,
        quota={"name": name, "limit": maximum, "used": used, "resets_at": None if free_at is None else int(free_at)},
    )


def _leaving(upload: Upload, name: OpenLimit, *, now: float) -> list[tuple[int, float]]:
    """Return how much of the upload stops counting without a request, and by when. Parts are deleted by garbage
    collection, which runs once a day."""
    is_open = status(upload, now=now) == "pending"
    if name == "open_uploads":
        return [(1, upload.expires_at)] if is_open else []
    parts = (upload.part_bytes, upload.expires_at + KEPT_SECONDS + DAY_SECONDS)
    return [(max(0, upload.num_bytes - upload.part_bytes), upload.expires_at), parts] if is_open else [parts]


def _check_size(session: Session, upload: Upload, content: Blob, settings: Settings) -> None:
    """Raises TooLarge if the upload would have too many parts or bytes, including parts that its completion will not
    name."""
    num_parts = session.scalar(select(func.count()).where(UploadPart.upload_id == upload.id)) or 0
    if num_parts >= MAX_PARTS:
        raise TooLarge(
            "too_many_parts", upload=upload.id, max_parts=MAX_PARTS, max_part_bytes=MAX_PART_BYTES, param="data"
        )
    maximum = min(max(2 * upload.num_bytes, SPARE_BYTES), settings.max_file_bytes)
    num_bytes = upload.part_bytes + content.num_bytes
    if num_bytes > maximum:
        raise TooLarge(
            "upload_too_large",
            upload=upload.id,
            num_bytes=num_bytes,
            maximum=maximum,
            announced_bytes=upload.num_bytes,
            param="data",
        )


def _named(session: Session, upload: Upload, part_ids: Sequence[str]) -> list[UploadPart]:
    """Return the parts in the given order. Bytes that occur twice in the file are one part, named twice. Raises
    InvalidRequest for an unknown part or a total size that differs from the announced one."""
    of_upload = session.scalars(select(UploadPart).where(UploadPart.upload_id == upload.id))
    known = {part.id: part for part in of_upload}
    index = next((index for index, part_id in enumerate(part_ids) if part_id not in known), None)
    if index is not None:
        part_id = part_ids[index][:64]
        raise InvalidRequest("part_not_found", index=index, part_id=part_id, upload=upload.id, param="part_ids")
    num_bytes = sum(known[part_id].num_bytes for part_id in part_ids)
    if num_bytes != upload.num_bytes:
        raise InvalidRequest(
            "upload_incomplete",
            num_bytes=num_bytes,
            upload=upload.id,
            announced_bytes=upload.num_bytes,
            param="part_ids",
        )
    return [known[part_id] for part_id in part_ids]


def _check_md5(upload_id: str, joined: str, sent: str | None) -> None:
    if sent is not None and joined != sent.lower():
        raise InvalidRequest("md5_mismatch", upload_id=upload_id, joined=joined, sent=sent, param="md5")


@dataclass(frozen=True, kw_only=True, slots=True)
class AssembledUpload:
    """The joined parts of an upload, in a temporary file."""

    path: Path
    content: Blob
    md5: str


@contextmanager
def assembled(store: ArtifactStore, parts: Sequence[UploadPart], folder: Path) -> Generator[AssembledUpload]:
    """Yield the joined parts, and delete their file after the block. Its name is that of a spooled upload, so the next
    start of the server removes what a killed process leaves."""
    path = folder / f"upload-{secrets.token_hex(12)}"
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    try:
        with full_disk_named():
            folder.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                for chunk in chain.from_iterable(store.open_blob(part.digest) for part in parts):
                    out.write(chunk)
                    sha256.update(chunk)
                    md5.update(chunk)
        content = Blob(digest=sha256.hexdigest(), num_bytes=path.stat().st_size)
        yield AssembledUpload(path=path, content=content, md5=md5.hexdigest())
    finally:
        path.unlink(missing_ok=True)
