"""Bytes that leave as an attachment, whatever they contain: never shown, never run, by a browser."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from urllib.parse import quote

from starlette.responses import StreamingResponse


def attachment(
    chunks: Iterator[bytes], *, filename: str, num_bytes: int | None, digest: str, media_type: str | None = None
) -> StreamingResponse:
    """The first chunk is read before the answer begins, so that what is missing can still be refused."""
    first = list(_first(chunks))
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in filename) or "download"
    headers = {
        "content-disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}",
        "etag": f'"{digest}"',
        "content-security-policy": "sandbox; default-src 'none'",
    }
    if num_bytes is not None:
        headers["content-length"] = str(num_bytes)
    return StreamingResponse(chain(first, chunks), media_type=media_type or "application/octet-stream", headers=headers)


def _first(chunks: Iterator[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        return
