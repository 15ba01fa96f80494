"""Receives one uploaded file: parses the form as it arrives, and writes, counts and hashes the file in DATA/spool.

Memory use is one chunk, independent of the file's size. The spool file is removed when `receive_upload` ends.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from python_multipart.exceptions import FormParserError, ParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from api.transfers.multipart_form import FILE, FormShape, UploadForm
from catalog.disk import full_disk_named
from catalog.errors import InvalidRequest, TooLarge

WRITE_BYTES = 2**18
FORM_OVERHEAD_BYTES = 2**16
"""Maximum size of everything in a form other than the file: fields, part headers, boundaries."""
STALE_SECONDS = 24 * 3600


@dataclass(frozen=True, kw_only=True, slots=True)
class ReceivedUpload:
    """A complete file in the spool folder, with the form's fields."""

    fields: dict[str, str]
    filename: str
    path: Path
    num_bytes: int
    digest: str


class Spool:
    """A file in the spool folder of at most `max_bytes`. It is removed at the end of the block."""

    def __init__(self, folder: Path, *, max_bytes: int, shape: FormShape) -> None:
        self.path = folder / f"upload-{secrets.token_hex(12)}"
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._shape = shape
        self._hash = hashlib.sha256()
        self._file: BinaryIO | None = None

    def __enter__(self) -> Spool:
        with full_disk_named():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_new(self.path)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
        self.path.unlink(missing_ok=True)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        """Raises TooLarge, or OutOfSpace if the disk is full."""
        assert self._file is not None
        if self.num_bytes + len(data) > self._max_bytes:
            raise _too_large(self._max_bytes, self._shape)
        with full_disk_named():
            self._file.write(data)
        self._hash.update(data)
        self.num_bytes += len(data)


def open_new(path: Path) -> BinaryIO:
    """Create a file without buffering, so that a full disk is reported by the write and not by the close."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0)


@asynccontextmanager
async def receive_upload(
    request: Request, *, folder: Path, max_bytes: int, shape: FormShape = FILE
) -> AsyncGenerator[ReceivedUpload]:
    """Yield the upload in `request`, a form of that shape. The spool file exists until the end of the block.

    Raises InvalidRequest, TooLarge or OutOfSpace; the rest of the body is then not read.
    """
    form = UploadForm(shape)
    boundary = _boundary(request, shape)
    _check_declared_size(request, max_bytes, shape)
    with Spool(folder, max_bytes=max_bytes, shape=shape) as spool:
        await _parse(request.stream(), boundary, form, spool, max_body_bytes=max_bytes + FORM_OVERHEAD_BYTES)
        yield ReceivedUpload(
            fields=form.fields(),
            filename=form.filename(),
            path=spool.path,
            num_bytes=spool.num_bytes,
            digest=spool.digest,
        )


def remove_stale(folder: Path) -> None:
    """Remove spool files that a killed process left behind."""
    for path in folder.glob("upload-*") if folder.is_dir() else ():
        if path.stat().st_mtime < time.time() - STALE_SECONDS:
            path.unlink(missing_ok=True)


def _too_large(max_bytes: int, shape: FormShape, *, declared_bytes: int | None = None) -> TooLarge:
    if declared_bytes is not None:
        name = f"declared_{shape.noun}_too_large"
        return TooLarge(name, declared_bytes=declared_bytes, max_bytes=max_bytes, param=shape.content)
    return TooLarge(f"{shape.noun}_too_large", max_bytes=max_bytes, param=shape.content)


async def _parse(
    body: AsyncIterator[bytes], boundary: bytes, form: UploadForm, spool: Spool, *, max_body_bytes: int
) -> None:
    total = num_parsed = 0
    try:
        parser = MultipartParser(boundary, form.callbacks())
        async for chunk in body:
            total += len(chunk)
            if total > max_body_bytes:
                raise _too_large(max_body_bytes - FORM_OVERHEAD_BYTES, form.shape)
            parser.write(chunk)
            num_parsed = total
            if len(form.pending) >= WRITE_BYTES:
                await run_in_threadpool(spool.write, form.take())
        parser.finalize()
    except FormParserError as error:
        raise InvalidRequest(
            f"{form.shape.noun}_form_invalid", fault=_fault(error, num_parsed), param=form.shape.content
        ) from error
    except ClientDisconnect as error:
        raise InvalidRequest(
            "upload_interrupted", total=total, content=form.shape.noun, param=form.shape.content
        ) from error
    if form.pending:
        await run_in_threadpool(spool.write, form.take())
    form.check_complete()


def _fault(error: FormParserError, num_parsed: int) -> str:
    """Return the parser's message with the position in the body. Its own offset counts from the current chunk."""
    if isinstance(error, ParseError) and error.offset >= 0:
        return f"the error is near byte {num_parsed + error.offset:,}"
    return f"{str(error)[:1].lower()}{str(error)[1:].rstrip('.')}"


def _boundary(request: Request, shape: FormShape) -> bytes:
    given = request.headers.get("content-type")
    kind, options = parse_options_header(given)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        if given:
            raise InvalidRequest(f"{shape.noun}_content_type_invalid", content_type=given[:80], param=shape.content)
        raise InvalidRequest(f"{shape.noun}_content_type_missing", param=shape.content)
    return boundary


def _check_declared_size(request: Request, max_bytes: int, shape: FormShape) -> None:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes + FORM_OVERHEAD_BYTES:
        raise _too_large(max_bytes, shape, declared_bytes=int(declared))
