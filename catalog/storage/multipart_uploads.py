"""Files that come in parts: an upload is announced, its parts are stored one by one, and completing it makes the file.

Every verb may be sent again: the same bytes are the same part, and one file is made of an upload at most. One that is
announced twice is two, of which the one without parts goes after its hour.
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
"""OpenAI's, and what its client cuts a file into."""
MAX_PARTS = 10_000
OPEN_SECONDS = 3600.0
"""So long parts may come, OpenAI's."""
KEPT_SECONDS = 24 * 3600.0
"""So long after that an upload still tells what became of it."""
SPARE_BYTES = 2**20
"""What an upload may hold in parts in any case: twice what was announced, else. Parts may come cut in another way."""
JOIN_LEASE_SECONDS = 900.0
MAX_COMPLETIONS = 10
"""Without success, of one upload."""
Status = Literal["pending", "completed", "cancelled", "expired"]
OpenLimit = Literal["open_uploads", "open_upload_bytes"]
_KEPT_PARTS = "What was sent in parts counts until it leaves the disk, within two days."
_START_AGAIN = "Begin a new upload, and send its parts again."


@dataclass(frozen=True, kw_only=True, slots=True)
class UploadView:
    """An upload as it is now; `file` once it is completed."""

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
    """Announce a file of so many bytes. Raises InvalidRequest, TooLarge for one that would be refused at its end."""
    files.check_purpose(purpose)
    files.check_size(num_bytes, settings, param="bytes")
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
    """Raises NotFound, and Conflict for an upload that takes nothing more."""
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
    """Store the bytes in `spooled`, which stays the caller's, as a part. content: what was sent.

    Raises what check_open does, InvalidRequest, TooLarge, OutOfSpace and Unavailable.
    """
    with db.read() as session:  # what would be refused isn't stored
        _check_addable(session, _open(session, project_id, upload_id), content, settings)
    files.put(store, spooled, content)
    return record_part(db, project_id=project_id, upload_id=upload_id, content=content, settings=settings)


def record_part(db: Database, *, project_id: str, upload_id: str, content: Blob, settings: Settings) -> UploadPart:
    """A part whose content is stored; the one that is there where the same bytes came before."""
    with db.write() as session:
        upload = _open(session, project_id, upload_id, lock=True)
        there = _check_addable(session, upload, content, settings)
        if there is not None:
            return there
        part = UploadPart(id=new_id("part"), upload_id=upload.id, num_bytes=content.num_bytes, digest=content.digest)
        part.created_at = read_clock(session)
        upload.part_bytes += part.num_bytes
        session.add(part)
        return part


def _check_addable(session: Session, upload: Upload, content: Blob, settings: Settings) -> UploadPart | None:
    """The part that has these bytes already. Raises InvalidRequest and TooLarge for bytes that can be none."""
    if content.num_bytes == 0:
        raise InvalidRequest("The part is empty.", code="part_empty", remedy="Send some bytes.", param="data")
    of_upload = select(UploadPart).where(UploadPart.upload_id == upload.id)
    there = session.scalar(of_upload.where(UploadPart.digest == content.digest))
    if there is None:
        _check_size(session, upload, content, settings)
    return there


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
    """Join the parts in that order in a file of `folder`, check them as any upload, and make the file.

    md5: of the whole, in hex. is_abandoned: stops the check. Raises what files.create does, NotFound, and Conflict for
    an upload that accepts nothing more, or that was completed MAX_COMPLETIONS times without success. If the client says
    that it sends this again, having had no reply, an upload that is completed is its answer.
    """
    with db.write() as session:
        upload = _find(session, project_id, upload_id, lock=True)
        if is_client_retry and upload.file_id is not None:
            return _completed(session, upload)
        now = read_clock(session)
        _check_open(upload, now=now)
        parts = _named(session, upload, part_ids)
        stored_quota.check_stored(session, project_id, upload.num_bytes, now=now)  # what would be refused isn't stored
        _check_completions(upload)
        _lease(upload, now=now)
    try:
        file = _whole_file(store, upload, parts, md5=md5, folder=folder, settings=settings, is_abandoned=is_abandoned)
        with db.write() as session:
            upload = _find(session, project_id, upload_id, lock=True)
            if is_client_retry and upload.file_id is not None:  # both were under way, and one outlived its lease
                return _completed(session, upload)
            _check_not_over(upload)
            files.show(session, file, lifetime_seconds=upload.lifetime_seconds)
            session.flush()  # the file's row goes first: the upload refers to it
            upload.file_id, upload.completing_until = file.id, None
            if file.digest in {part.digest for part in parts}:  # the one part, whose bytes are the file's now
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
    """The parts joined, checked and stored; its row is not visible yet."""
    with assembled(store, parts, folder) as whole:
        _check_md5(whole.md5, md5)
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
    """Each completion joins and checks the whole file again. Raises Conflict."""
    if upload.num_completions >= MAX_COMPLETIONS:
        raise Conflict(
            f"The upload {upload.id} was completed {upload.num_completions} times without success.",
            code="too_many_completions",
            remedy=f"{_START_AGAIN} What is wrong with them was the answer to each completion.",
        )


def _is_of_the_service(error: LorryError) -> bool:
    """The service failed, and not what was sent. A client that disconnects is not such a failure, nor is a check that
    crashed: the file may need more memory than there is."""
    return isinstance(error, Unavailable | OutOfSpace) and not isinstance(error, CheckStopped | CheckCrashed)


def _lease(upload: Upload, *, now: float) -> None:
    """So that nobody else joins the same parts meanwhile. Raises Unavailable where somebody does: ask again."""
    if upload.completing_until is not None and upload.completing_until > now:
        raise Unavailable(
            f"The upload {upload.id} is being completed.",
            code="upload_completing",
            remedy="Ask again in a few seconds: it is answered with the file.",
        )
    upload.completing_until = now + JOIN_LEASE_SECONDS
    upload.num_completions += 1


def _end_lease(db: Database, upload_id: str, *, is_counted: bool) -> None:
    """A completion that failed may be tried again at once; if that can't be written, after the lease."""
    values: dict[str, Any] = {"completing_until": None}
    if not is_counted:
        values["num_completions"] = Upload.num_completions - 1
    with suppress(LorryError), db.write() as session:
        session.execute(update(Upload).where(Upload.id == upload_id).values(values))


def cancel(db: Database, *, project_id: str, upload_id: str, is_client_retry: bool = False) -> UploadView:
    """Take no more parts. One that has expired stays so; a repeated request is answered as the first was."""
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
    """Drop the parts of uploads that take no more of them, and after a day the uploads: by then what is left of their
    parts in the store is old enough to go with this same cleaning."""
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
        raise NotFound("upload", upload_id, param="upload_id")
    return upload


def _completed(session: Session, upload: Upload) -> UploadView:
    return UploadView(upload=upload, status="completed", file=session.get_one(File, upload.file_id))


def _check_open(upload: Upload, *, now: float) -> None:
    _check_not_over(upload)
    if status(upload, now=now) == "expired":
        message = f"The upload {upload.id} has expired: its parts had an hour to come."
        raise Conflict(message, code="upload_expired", remedy=_START_AGAIN, param="upload_id")


def _check_not_over(upload: Upload) -> None:
    if upload.file_id is not None:
        message = f"The upload {upload.id} is completed already, as {upload.file_id}."
        remedy = "Use that file, or begin a new upload."
        raise Conflict(message, code="upload_completed", remedy=remedy, param="upload_id")
    if upload.cancelled_at is not None:
        message = f"The upload {upload.id} was cancelled."
        raise Conflict(message, code="upload_cancelled", remedy=_START_AGAIN, param="upload_id")


def _check_open_ones(session: Session, project_id: str, num_bytes: int, settings: Settings, *, now: float) -> None:
    """Raises QuotaExceeded for one upload more than may be open at once, by number and by bytes: those that were
    announced, and of an upload that is over those that its parts had, until they are cleaned."""
    serialize(session, f"uploads {project_id}")
    is_open = and_(Upload.file_id.is_(None), Upload.cancelled_at.is_(None), Upload.expires_at > now)
    num_bytes_of = case(
        (and_(is_open, Upload.num_bytes > Upload.part_bytes), Upload.num_bytes), else_=Upload.part_bytes
    )
    sums = select(func.count().filter(is_open), func.coalesce(func.sum(num_bytes_of), 0))
    count, held = session.execute(sums.where(Upload.project_id == project_id, COUNTED)).one()
    if count + 1 > settings.max_open_uploads:
        raise _too_many(
            session, project_id, "open_uploads", used=count, more=1, most=settings.max_open_uploads, now=now
        )
    most = settings.max_open_upload_bytes
    if held + num_bytes > most:
        raise _too_many(session, project_id, "open_upload_bytes", used=int(held), more=num_bytes, most=most, now=now)


def _too_many(
    session: Session, project_id: str, name: OpenLimit, *, used: int, more: int, most: int, now: float
) -> QuotaExceeded:
    counted = session.scalars(select(Upload).where(Upload.project_id == project_id, COUNTED))
    leaving = [one for upload in counted for one in _leaving(upload, name, now=now)]
    free_at = quotas.enough_at(leaving, used + more - most, now=now)
    return QuotaExceeded(
        f"The project may have {most:,} {name.replace('_', ' ')} at once, and has {used:,}.",
        code="too_many_open_uploads",
        remedy=f"Complete or cancel some; one that is left alone ends after an hour. {_KEPT_PARTS}",
        retry_after_seconds=math.inf if free_at is None else free_at - now,
        quota={"name": name, "limit": most, "used": used, "resets_at": None if free_at is None else int(free_at)},
    )


def _leaving(upload: Upload, name: OpenLimit, *, now: float) -> list[tuple[int, float]]:
    """How much of the upload leaves by itself, and by when: its parts with a cleaning, which is a day after another."""
    is_open = status(upload, now=now) == "pending"
    if name == "open_uploads":
        return [(1, upload.expires_at)] if is_open else []
    parts = (upload.part_bytes, upload.expires_at + KEPT_SECONDS + DAY_SECONDS)
    return [(max(0, upload.num_bytes - upload.part_bytes), upload.expires_at), parts] if is_open else [parts]


def _check_size(session: Session, upload: Upload, content: Blob, settings: Settings) -> None:
    """All parts of an upload together, those included that will not be named at its end."""
    num_parts = session.scalar(select(func.count()).where(UploadPart.upload_id == upload.id)) or 0
    if num_parts >= MAX_PARTS:
        message = f"The upload has {MAX_PARTS:,} parts, which is the most."
        raise TooLarge(message, code="too_many_parts", remedy=f"{_START_AGAIN} Make them larger.", param="data")
    most = min(settings.max_file_bytes, max(2 * upload.num_bytes, SPARE_BYTES))
    if upload.part_bytes + content.num_bytes > most:
        raise TooLarge(
            f"With this part the upload would hold more than {most:,} bytes; {upload.num_bytes:,} were announced.",
            code="upload_too_large",
            remedy=f"{_START_AGAIN} The most of all is LORRY_MAX_FILE_BYTES, which an operator can raise.",
            param="data",
        )


def _named(session: Session, upload: Upload, part_ids: Sequence[str]) -> list[UploadPart]:
    """The parts in that order. The same bytes twice are one part, which is named twice then."""
    of_upload = session.scalars(select(UploadPart).where(UploadPart.upload_id == upload.id))
    known = {part.id: part for part in of_upload}
    unknown = next((part_id for part_id in part_ids if part_id not in known), None)
    if unknown is not None:
        raise InvalidRequest(
            f"The upload {upload.id} has no part {unknown[:64]!a}.",
            code="part_not_found",
            remedy="Name the ids that its parts were answered with, in the order of the file.",
            param="part_ids",
        )
    num_bytes = sum(known[part_id].num_bytes for part_id in part_ids)
    if num_bytes != upload.num_bytes:
        raise InvalidRequest(
            f"The parts have {num_bytes:,} bytes together, and {upload.num_bytes:,} were announced.",
            code="upload_incomplete",
            remedy="Name every part, in the order of the file, or begin a new upload with the right number of bytes.",
            param="part_ids",
        )
    return [known[part_id] for part_id in part_ids]


def _check_md5(joined: str, sent: str | None) -> None:
    if sent is not None and joined != sent.lower():
        raise InvalidRequest(
            "The md5 of the joined parts is not the one that was sent with them.",
            code="md5_mismatch",
            remedy="Name the parts in the order of the file; if they are, begin a new upload and send them again.",
            param="md5",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AssembledUpload:
    """The parts of an upload, joined."""

    path: Path
    content: Blob
    md5: str


@contextmanager
def assembled(store: ArtifactStore, parts: Sequence[UploadPart], folder: Path) -> Generator[AssembledUpload]:
    """One file of all; gone after the block. Its name is that of any spooled upload, which a later start removes."""
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
