"""Unpacks a downloaded adapter archive into a folder: each member is checked, then the folder is renamed as a whole.

tarfile only reads headers and never writes here, so no member can choose its own destination.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, cast

from lorry.errors import BadDownload
from lorry.verification.adapter_folder import LINEAGE, MANIFEST, Contents, FileEntry

_PIECE_BYTES = 2**20
_SLACK_BYTES = 2**20
_SLACK_PER_FILE_BYTES = 4096


def unpack(
    chunks: Iterable[bytes], contents: Contents, target: Path, *, on_progress: Callable[[int, int], None] | None = None
) -> Path:
    """Write exactly the files of `contents` to `target`. Raises BadDownload, and then leaves nothing behind."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        _unpack_into(temporary, _Body(chunks, contents, on_progress), contents)
        contents.write_records(temporary)
        temporary.chmod(0o755)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _unpack_into(folder: Path, body: _Body, contents: Contents) -> None:
    missing = dict(contents.files)
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", body), mode="r|") as tar:
            for member in tar:
                entry = _checked(member, missing, contents)
                if entry is not None:
                    source = tar.extractfile(member)
                    if source is None:
                        raise _refused(member, "has no content", contents)
                    _copy(source, folder / entry.path, entry, contents)
                    del missing[entry.path]
    except tarfile.TarError as error:
        raise BadDownload("archive_incomplete", contents=contents.name, error=str(error)) from error
    if missing:
        raise BadDownload("archive_file_missing", contents=contents.name, missing=", ".join(sorted(missing)))


def _checked(member: tarfile.TarInfo, missing: dict[str, FileEntry], contents: Contents) -> FileEntry | None:
    """Return the file of a member; None for skipped members: folders, and the two records, which are written later."""
    if member.name in {MANIFEST, LINEAGE} or member.isdir():
        return None
    if not member.isreg():
        raise _refused(member, "is not a regular file", contents)
    entry = missing.get(member.name)
    if entry is None:
        is_repeated = member.name in contents.files
        raise _refused(member, "appears twice" if is_repeated else "is not listed in the manifest", contents)
    if member.size != entry.num_bytes:
        raise _refused(member, f"has {member.size:,} bytes, but the manifest lists {entry.num_bytes:,} bytes", contents)
    return entry


def _copy(source: IO[bytes], path: Path, entry: FileEntry, contents: Contents) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with path.open("xb") as out:
        while piece := source.read(_PIECE_BYTES):
            digest.update(piece)
            out.write(piece)
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != entry.digest:
        raise BadDownload("archive_digest_mismatch", path=entry.path, contents=contents.name)


class _Body(io.RawIOBase):
    """The chunks of a response as a file of bounded size for tarfile."""

    def __init__(
        self, chunks: Iterable[bytes], contents: Contents, on_progress: Callable[[int, int], None] | None
    ) -> None:
        super().__init__()
        self._chunks: Iterator[bytes] = iter(chunks)
        self._rest = b""
        self._num_read = 0
        self._contents = contents
        self._most_bytes = _most_bytes(contents)
        self._on_progress = on_progress

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        pieces, wanted = list[bytes](), self._most_bytes + 1 if size < 0 else size
        while wanted > 0 and (piece := self._rest or next(self._chunks, b"")):
            pieces.append(piece[:wanted])
            self._rest = piece[wanted:]
            wanted -= len(pieces[-1])
        taken = b"".join(pieces)
        self._count(len(taken))
        return taken

    def _count(self, num_bytes: int) -> None:
        self._num_read += num_bytes
        if self._num_read > self._most_bytes:
            raise BadDownload("archive_too_large", contents=self._contents.name, most_bytes=self._most_bytes)
        if self._on_progress is not None:
            self._on_progress(self._num_read, self._most_bytes)


def _most_bytes(contents: Contents) -> int:
    """Return an upper bound of the archive's size: the files, tar's headers and padding, and the two records."""
    files = contents.files.values()
    return sum(entry.num_bytes + _SLACK_PER_FILE_BYTES for entry in files) + _SLACK_BYTES


def _refused(member: tarfile.TarInfo, reason: str, contents: Contents) -> BadDownload:
    return BadDownload("archive_file_unexpected", member=member.name[:200], contents=contents.name, reason=reason)
