"""Uploaded files and their data reports."""

from __future__ import annotations

import errno
import hashlib
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lorry.errors import BadDownload
from lorry.models import File
from lorry.resources.resource import Resource, url

OnBytes = Callable[[int, int], None]
"""Called with the number of bytes transferred so far, and the total (0: unknown)."""


class Files(Resource):
    def upload(
        self,
        path: Path | str,
        *,
        purpose: str = "fine-tune",
        expires_after_seconds: int | None = None,
        on_progress: OnBytes | None = None,
    ) -> File:
        """Stream a file to the service; memory use is bounded. The service validates training data line by line.

        `expires_after_seconds`: the file is deleted this long after the upload, once no job uses it. One hour to 30
        days.
        """
        path = Path(path)
        fields = {"purpose": purpose}
        if expires_after_seconds is not None:
            fields |= {"expires_after[anchor]": "created_at", "expires_after[seconds]": str(expires_after_seconds)}
        with path.open("rb") as source:
            body = _Reported(source, path.stat().st_size, on_progress)
            uploaded = self._transport.upload(
                "files", fields=fields, files={"file": (path.name, body, "application/jsonl")}
            )
        return File.of(uploaded)

    def list(self, *, limit: int | None = None, purpose: str | None = None) -> Iterator[File]:
        return self._list(File, "files", limit=limit, params={"purpose": purpose})

    def get(self, file_id: str) -> File:
        return self._get(File, "files", file_id)

    def content(self, file_id: str) -> Iterator[bytes]:
        """Yield the bytes as they were uploaded, in pieces."""
        with self._transport.stream(url("files", file_id, "content")) as response:
            yield from response.iter_bytes()

    def download(self, file_id: str, path: Path | str | None = None) -> Path:
        """Write the bytes to a new file and return its path. The file only appears if it matches its digest.

        `path`: by default the file's own name, in the current folder. Raises FileExistsError and BadDownload.
        """
        file = self.get(file_id)
        target = Path(path) if path is not None else Path(Path(file.filename).name or file_id)
        if target.exists():
            raise FileExistsError(errno.EEXIST, "A file of this name already exists", str(target))
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            with partial.open("xb") as out:
                self._write(file, out)
            return partial.rename(target)
        finally:
            partial.unlink(missing_ok=True)

    def _write(self, file: File, out: IO[bytes]) -> None:
        digest = hashlib.sha256()
        for piece in self.content(file.id):
            out.write(piece)
            digest.update(piece)
        if digest.hexdigest() != file.digest:
            raise BadDownload("bad_download", file=file.id)

    def report(self, file_id: str, *, model: str) -> dict[str, Any]:
        """Return the data report of the file as tokenized for `model`: rows, tokens, truncated rows and so on."""
        return self._transport.get(url("files", file_id, "report"), {"model": model})

    def delete(self, file_id: str) -> None:
        self._delete("files", file_id)


class _Reported:
    """A file for httpx's multipart encoder, which reads it in pieces and rewinds it before a retry."""

    def __init__(self, source: IO[bytes], num_bytes: int, on_progress: OnBytes | None) -> None:
        self._source = source
        self._num_bytes = num_bytes
        self._on_progress = on_progress

    def read(self, size: int = -1) -> bytes:
        piece = self._source.read(size)
        if self._on_progress is not None:
            self._on_progress(self._source.tell(), self._num_bytes)
        return piece

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._source.seek(offset, whence)

    def tell(self) -> int:
        return self._source.tell()

    def fileno(self) -> int:
        return self._source.fileno()
