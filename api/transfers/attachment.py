"""Sends downloads from the store as attachments, so that a browser never displays or executes them.

A client that reads slowly or not at all occupies two chunks of READ_BYTES plus the buffers of its connection. The
number of concurrent downloads is limited per key, per project and per process. `api.server` ends connections that are
too slow. The tar archive of an adapter is generated while it is sent. The same adapter yields the same bytes.
"""

from __future__ import annotations

import base64
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import quote

import anyio
import anyio.to_thread
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.requests.disconnects import watched
from catalog.caller import Caller
from catalog.errors import RateLimited, Unavailable

READ_BYTES = 2**20
"""Size of the chunks in which blobs are read. A reader holds one chunk, and the previous one until it has verified the
digest of the whole blob."""
PIECE_BYTES = 2**17
"""Size of the pieces passed to the connection. The next piece follows when most of the previous one has been sent."""
MAX_DOWNLOADS_OF_KEY = 8
MAX_DOWNLOADS_OF_PROJECT = 16
MAX_DOWNLOADS = 64
READING_THREADS = 8
BUSY_SECONDS = 5.0
"""Seconds after which a client should try again."""
BLOCK_BYTES = 512
END_BYTES = 2 * BLOCK_BYTES


class Downloads:
    """Counts the downloads of this process, and reads the store in dedicated threads."""

    def __init__(
        self,
        *,
        per_key: int = MAX_DOWNLOADS_OF_KEY,
        per_project: int = MAX_DOWNLOADS_OF_PROJECT,
        per_process: int = MAX_DOWNLOADS,
    ) -> None:
        self._per_key = per_key
        self._per_project = per_project
        self._per_process = per_process
        self._of_keys: Counter[str] = Counter()
        self._of_projects: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._threads = anyio.CapacityLimiter(READING_THREADS)

    @contextmanager
    def admitted(self, *, api_key_id: str, project_id: str) -> Generator[None]:
        """Wrap one download. Raises RateLimited if the key or the project has too many, and Unavailable if the process
        has too many."""
        with self._lock:
            if self._of_keys[api_key_id] >= self._per_key:
                raise _too_many(f"API key {api_key_id}", self._per_key)
            if self._of_projects[project_id] >= self._per_project:
                raise _too_many(f"Project {project_id}", self._per_project)
            if self._of_keys.total() >= self._per_process:
                raise Unavailable("downloads_busy", per_process=self._per_process)
            self._of_keys[api_key_id] += 1
            self._of_projects[project_id] += 1
        try:
            yield
        finally:
            with self._lock:
                for running, owner in ((self._of_keys, api_key_id), (self._of_projects, project_id)):
                    running[owner] -= 1
                    if not running[owner]:
                        del running[owner]

    async def open(self, content: Callable[[], Iterator[bytes]]) -> Iterator[bytes]:
        return await anyio.to_thread.run_sync(content, limiter=self._threads)

    async def read(self, chunks: Iterator[bytes]) -> bytes | None:
        """Return the next chunk; None at the end."""
        return await anyio.to_thread.run_sync(next, chunks, None, limiter=self._threads)


class Download(Response):
    """An attachment that is read from the store while it is sent."""

    def __init__(
        self,
        downloads: Downloads,
        content: Callable[[], Iterator[bytes]],
        *,
        caller: Caller,
        record: Callable[[], None],
        filename: str,
        num_bytes: int,
        etag: str,
        sha256: str | None = None,
        media_type: str = "application/octet-stream",
    ) -> None:
        """`content` opens the content once the download is admitted. `record` records the download in the audit log; it
        is called after the first chunk is read, before it is sent. `sha256` is the digest of all bytes, in hex, if it
        is known in advance."""
        plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in filename) or "download"
        headers = {
            "content-disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}",
            "etag": f'"{etag}"',
            "content-security-policy": "sandbox; default-src 'none'",
        }
        if sha256 is not None:
            headers["repr-digest"] = f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:"
        super().__init__(headers=headers, media_type=media_type)
        self.headers["content-length"] = str(num_bytes)
        self._downloads = downloads
        self._content = content
        self._caller = caller
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response. The first chunk is read before the response begins, so that corruption found by then
        results in an error response."""
        with self._downloads.admitted(api_key_id=self._caller.api_key_id, project_id=self._caller.project_id):
            chunks = await self._downloads.open(self._content)
            chunk = await self._downloads.read(chunks)
            await anyio.to_thread.run_sync(self._record)
            async with watched(receive) as gone:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                while chunk is not None and not gone.is_set():
                    for start in range(0, len(chunk), PIECE_BYTES):
                        piece = chunk[start : start + PIECE_BYTES]
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                    chunk = await self._downloads.read(chunks)
                await send({"type": "http.response.body", "body": b"", "more_body": False})


def _too_many(owner: str, limit: int) -> RateLimited:
    if limit == 1:
        return RateLimited("one_download_at_once", owner=owner, retry_after_seconds=BUSY_SECONDS, headers={})
    return RateLimited("too_many_downloads", owner=owner, limit=limit, retry_after_seconds=BUSY_SECONDS, headers={})


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchiveMember:
    """A file of the archive. `read` is called when the member is sent."""

    path: str
    num_bytes: int
    read: Callable[[], Iterator[bytes]]


def inline(path: str, content: bytes) -> ArchiveMember:
    return ArchiveMember(path=path, num_bytes=len(content), read=lambda: iter((content,)))


def tar_chunks(members: list[ArchiveMember], *, modified_at: int) -> Iterator[bytes]:
    """Yield header, content and padding of each file, then the end marker."""
    for member in members:
        yield _header(member, modified_at)
        yield from member.read()
        yield b"\0" * _padding(member)
    yield b"\0" * END_BYTES


def tar_size(members: list[ArchiveMember], *, modified_at: int) -> int:
    """Return the size of the whole archive in bytes."""
    sizes = [len(_header(member, modified_at)) + member.num_bytes + _padding(member) for member in members]
    return sum(sizes) + END_BYTES


def _padding(member: ArchiveMember) -> int:
    return -member.num_bytes % BLOCK_BYTES


def _header(member: ArchiveMember, modified_at: int) -> bytes:
    info = tarfile.TarInfo(member.path)
    info.size = member.num_bytes
    info.mtime = modified_at
    info.mode = 0o644
    return info.tobuf(format=tarfile.PAX_FORMAT)
