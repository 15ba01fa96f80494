"""Content-addressed blobs and manifests. Blobs are written before their manifest, and all content is verified on read.

The key of a blob, `blobs/ab/abcdef…`, contains the sha256 of its content, so writes are idempotent. Only
`delete_unreferenced` deletes objects. It keeps young ones, because a transaction may be about to refer to them.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, NoReturn

from catalog.disk import full_disk_named
from catalog.errors import OutOfSpace
from catalog.settings import Settings
from catalog.storage.manifest import DamagedArtifact, Manifest, ManifestFile, check_digest
from catalog.storage.object_storage import CHUNK_BYTES, NoSuchObject, Objects

log = logging.getLogger("lorry.catalog")
GRACE_SECONDS = 24 * 3600.0
"""An unreferenced object is kept at least this long, which is longer than any upload or export takes."""
CLOCK_SECONDS = 600.0
"""How long a reading of the store's clock is used."""
TRASH = "trash/"
"""Prefix of the keys of deleted objects, which stay readable for another grace period. obstore can't delete an object
on the condition that it is old, so a writer may put it again between the check of its age and its deletion."""
MAX_COPIED_BYTES = 5 * 2**30
"""S3 can't copy a larger object in one request, so larger ones are deleted without the trash."""
REFRESH_SECONDS = GRACE_SECONDS / 4
"""Putting a blob that is older than this writes it again, which restarts its grace period."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Blob:
    """Digest (sha256, hex) and size of one stored content."""

    digest: str
    num_bytes: int


def open_store(settings: Settings) -> ArtifactStore:
    """Return the store that the settings specify. Raises Unavailable."""
    return ArtifactStore(Objects(settings.resolved_store_url()))


class ArtifactStore:
    """Blobs and manifests in an object store.

    Methods raise OutOfSpace, Unavailable, and DamagedArtifact if content and digest differ.
    """

    def __init__(self, objects: Objects, *, clock: Callable[[], float] | None = None) -> None:
        """clock: replaces the store's clock in tests; in seconds since 1970."""
        self.objects = objects
        self.clock = clock or objects.now
        self._clock_read = (-math.inf, 0.0)

    def put_file(self, path: Path) -> Blob:
        """Store the content of one file. Idempotent. Raises DamagedArtifact if a large file changes meanwhile."""
        with path.open("rb") as file:
            return self._put_opened(file, path.name)

    def _put_opened(self, file: BinaryIO, name: str, *, check: Callable[[], None] = lambda: None) -> Blob:
        content = file.read(CHUNK_BYTES + 1)
        if len(content) <= CHUNK_BYTES:
            return self.put_bytes(content)
        blob = _digest_of(file, check=check)
        if not self._has(blob_key(blob.digest), blob.num_bytes):
            unchanged = verified(
                _chunks(file, check=check),
                blob.digest,
                if_changed="file_changed_while_stored",
                name=name,
            )
            self.objects.put(blob_key(blob.digest), unchanged)
        return blob

    def put_bytes(self, content: bytes) -> Blob:
        """Store a content that fits in memory."""
        blob = Blob(digest=sha256(content).hexdigest(), num_bytes=len(content))
        if not self._has(blob_key(blob.digest), blob.num_bytes):
            self.objects.put(blob_key(blob.digest), content)
        return blob

    def put_folder(
        self, folder: Path, *, kind: str, dir_fd: int | None = None, check: Callable[[], None] = lambda: None
    ) -> Manifest:
        """Store every file under `folder`, then the manifest that lists them.

        dir_fd: descriptor of an open folder to which `folder` is relative. check: called for each chunk of a large
        file, whose storage takes longer than a lease. If it raises, the file is not stored. Raises DamagedArtifact for
        symbolic links and for files with several hard links: the process that wrote the folder might not be allowed to
        read their targets. Replacing a file or a folder by a link while this runs has no effect.
        """
        if not stat.S_ISDIR(_mode_of(folder, dir_fd)):
            raise DamagedArtifact("stored_folder_missing", folder=folder.name)
        files: list[tuple[str, Blob]] = []
        walk = os.fwalk(folder, dir_fd=dir_fd, follow_symlinks=False, onerror=_raise)
        for parent, folders, names, descriptor in walk:
            for name in folders:
                if not stat.S_ISDIR(_mode_of(Path(name), descriptor)):
                    raise DamagedArtifact("stored_path_not_folder", parent=Path(parent, name).as_posix())
            for name in names:
                path = Path(parent, name).relative_to(folder).as_posix()
                with _opened_plain(name, descriptor, path) as file:
                    blob = self._put_opened(file, path, check=check)
                files.append((path, blob))
        manifest = _manifest_of(folder, kind, files)
        self.put_manifest(manifest)
        return manifest

    def put_manifest(self, manifest: Manifest) -> None:
        """Store a manifest. Its blobs must be stored already."""
        content = manifest.canonical()
        if not self._has(manifest_key(manifest.digest), len(content)):
            self.objects.put(manifest_key(manifest.digest), content)

    def get_manifest(self, digest: str) -> Manifest:
        check_digest(digest)
        try:
            content = b"".join(read_stored(self.objects, manifest_key(digest)))
        except NoSuchObject as error:
            raise DamagedArtifact("manifest_missing", digest=digest) from error
        if sha256(content).hexdigest() != digest:
            raise DamagedArtifact("manifest_changed", digest=digest)
        try:
            return Manifest.parse(content)
        except DamagedArtifact as error:
            raise DamagedArtifact("manifest_invalid", digest=digest, message=error.message) from error

    def open_blob(self, digest: str, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Yield the content in chunks of at most `chunk_bytes`.

        Raises DamagedArtifact at the call if the blob is missing, and instead of the last chunk if it has changed.
        """
        check_digest(digest)
        try:
            chunks = read_stored(self.objects, blob_key(digest), chunk_bytes=chunk_bytes)
        except NoSuchObject as error:
            raise DamagedArtifact("object_missing", digest=digest) from error
        return verified(chunks, digest)

    def fetch(self, manifest: Manifest, into: Path, *, check: Callable[[], None] = lambda: None) -> None:
        """Download and verify the files into the folder `into`, all or none. `into` must be absent or empty.

        check: called for each chunk, because fetching a large file takes longer than a lease. If it raises, nothing is
        left.
        """
        with full_disk_named():
            into.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{into.name}.", dir=into.parent))
        try:
            with full_disk_named():
                for file in manifest.files:
                    self._fetch_file(file, temporary / file.path, check=check)
                temporary.chmod(0o755)
                temporary.rename(into)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _fetch_file(self, file: ManifestFile, path: Path, *, check: Callable[[], None]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as out:
            for chunk in self.open_blob(file.digest):
                out.write(chunk)
                check()
            out.flush()
            os.fsync(out.fileno())

    def verify(self, manifest: Manifest) -> list[str]:
        """Read every file back. Returns one sentence for each problem."""
        problems: list[str] = []
        for file in manifest.files:
            try:
                num_bytes = sum(len(chunk) for chunk in self.open_blob(file.digest))
            except DamagedArtifact as error:
                problems.append(f"{file.path}: {error.message}")
                continue
            if num_bytes != file.num_bytes:
                problems.append(
                    f"{file.path} has {num_bytes} bytes in the store, but {file.num_bytes} in its manifest."
                )
        return problems

    def empty_damaged(self, digest: str) -> None:
        """Empty the files of a manifest whose content has changed, so that putting them again writes them.

        Workers call this. To delete the objects, they would need a permission that they should not have.
        """
        try:
            manifest = self.get_manifest(digest)
        except DamagedArtifact:
            self.objects.put(manifest_key(digest), b"")
            return
        for file in manifest.files:
            alone = Manifest.of(manifest.kind, [file])
            if self.verify(alone):
                self.objects.put(blob_key(file.digest), b"")

    def delete_unreferenced(self, live: set[str], *, grace_seconds: float = GRACE_SECONDS) -> int:
        """Delete manifests and blobs that are not in `live` and older than the grace period by the store's clock.

        live: the digests of every manifest and blob that the database refers to. Returns the number of deleted
        objects. A young manifest keeps its blobs, because its row may not be committed yet; if it can't be read, that
        is logged. Objects that writers put meanwhile are young, and stay. If an object is put again between the last
        check of its age and its deletion, readers find it in the trash, and the next call with it in `live` moves it
        out of the trash. Raises Unavailable, OutOfSpace.
        """
        oldest = self.clock() - grace_seconds
        kept = {manifest_key(digest) for digest in live} | {blob_key(digest) for digest in live}
        for entry in self.objects.list_all("manifests"):
            is_unlisted = entry.key not in kept and entry.written_at >= oldest
            if is_unlisted and entry.num_bytes:  # an emptied manifest lists no blobs
                kept |= self._blobs_of(entry.key)
        num_deleted = 0
        for prefix in ("manifests", "blobs"):
            for entry in list(self.objects.list_all(prefix)):
                num_deleted += entry.key not in kept and self._discard_if_old(entry.key, oldest)
        self._empty_trash(kept, oldest)
        self.objects.delete_staged(older_than=oldest)
        return num_deleted

    def check_reachable(self) -> None:
        """Raises Unavailable if the store does not respond."""
        try:
            self.objects.head("manifests/none")
        except NoSuchObject:
            return

    def _has(self, key: str, num_bytes: int) -> bool:
        try:
            entry = self.objects.head(key)
        except NoSuchObject:
            return False
        return entry.num_bytes == num_bytes and self._recent_clock() - entry.written_at < REFRESH_SECONDS

    def _recent_clock(self) -> float:
        """Return the store's time, from a reading of its clock at most CLOCK_SECONDS ago.

        The monotonic clock may stop while a machine is suspended, and the result is then late. A blob that is not
        written again has at least 18 hours of its grace period left, which is longer than such a delay.
        """
        read_at, seconds = self._clock_read
        elapsed = time.monotonic() - read_at
        if elapsed > CLOCK_SECONDS or self.clock != self.objects.now:
            self._clock_read = (time.monotonic(), self.clock())
            return self._clock_read[1]
        return seconds + elapsed

    def _blobs_of(self, key: str) -> set[str]:
        """Return the keys of the blobs that a stored manifest lists, or none if it can't be read."""
        digest = key.removeprefix("manifests/").removesuffix(".json")
        try:
            return {blob_key(file.digest) for file in self.get_manifest(digest).files}
        except DamagedArtifact as error:
            log.warning("manifest without a row can't be read code=%s: %s", error.code, error)
            return set()

    def _discard_if_old(self, key: str, oldest: float) -> bool:
        """Delete the object if it is still old: a writer may have put it again since it was listed."""
        try:
            entry = self.objects.head(key)
            if entry.written_at >= oldest:
                return False
            if entry.num_bytes > MAX_COPIED_BYTES:
                self.objects.delete(key)
                return True
            try:
                self.objects.move(key, TRASH + key)
            except OutOfSpace:  # a full bucket has no space for the copy, and this must free some
                self.objects.delete(key)
        except NoSuchObject:
            return False
        return True

    def _empty_trash(self, kept: set[str], oldest: float) -> None:
        """Move referenced objects out of the trash, and delete old ones.

        In a folder a moved object keeps its age, so the same run deletes it. In a bucket its age counts from the move.
        """
        for entry in list(self.objects.list_all(TRASH.rstrip("/"))):
            key = entry.key.removeprefix(TRASH)
            try:
                if key in kept and not self._exists(key):
                    self.objects.move(entry.key, key)
                elif key in kept or entry.written_at < oldest:
                    self.objects.delete(entry.key)
            except NoSuchObject:
                continue  # a concurrent run has moved or deleted it

    def _exists(self, key: str) -> bool:
        try:
            self.objects.head(key)
        except NoSuchObject:
            return False
        return True


def _manifest_of(folder: Path, kind: str, files: Iterable[tuple[str, Blob]]) -> Manifest:
    """Return the manifest of a folder that is stored now. Raises DamagedArtifact with the remedy for such a folder."""
    try:
        rows = (ManifestFile(path=path, digest=blob.digest, num_bytes=blob.num_bytes) for path, blob in files)
        return Manifest.of(kind, rows)
    except DamagedArtifact as error:
        raise DamagedArtifact("folder_not_storable", folder=folder.name, message=error.message) from error


def read_stored(objects: Objects, key: str, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Yield chunks of the object, or of the one that the trash has for its key. Raises NoSuchObject at the call."""
    try:
        return objects.read(key, chunk_bytes=chunk_bytes)
    except NoSuchObject:
        return objects.read(TRASH + key, chunk_bytes=chunk_bytes)


def blob_key(digest: str) -> str:
    return f"blobs/{digest[:2]}/{digest}"


def manifest_key(digest: str) -> str:
    return f"manifests/{digest}.json"


def _raise(error: OSError) -> NoReturn:
    """Raise the error of a walk, which would skip the folder otherwise."""
    raise error


def _mode_of(path: Path, dir_fd: int | None) -> int:
    """Return the mode of the path itself, without following links; 0 if it does not exist."""
    try:
        return os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return 0


def _opened_plain(name: str, dir_fd: int, path: str) -> BinaryIO:
    """Open a regular file without following links and without blocking on a pipe. path: for errors. Raises
    DamagedArtifact."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise DamagedArtifact("stored_file_not_regular", path=path) from error
    file = os.fdopen(descriptor, "rb")
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        file.close()
        raise DamagedArtifact("stored_file_has_links", path=path)
    return file


def _chunks(file: BinaryIO, *, check: Callable[[], None]) -> Iterator[bytes]:
    """Yield the chunks of the whole file, from its first byte. check: called for each chunk."""
    file.seek(0)
    while chunk := file.read(CHUNK_BYTES):
        check()
        yield chunk


def _digest_of(file: BinaryIO, *, check: Callable[[], None]) -> Blob:
    digest, num_bytes = sha256(), 0
    for chunk in _chunks(file, check=check):
        digest.update(chunk)
        num_bytes += len(chunk)
    return Blob(digest=digest.hexdigest(), num_bytes=num_bytes)


def verified(
    chunks: Iterator[bytes], digest: str, *, if_changed: str = "object_changed", **values: str
) -> Iterator[bytes]:
    """Yield the chunks, the last one only if the content matches `digest`.

    A reader therefore never receives all of a damaged content. Raises DamagedArtifact in place of the last chunk, with
    the text `if_changed` and its values.
    """
    seen = sha256()
    last: bytes | None = None
    for chunk in chunks:
        seen.update(chunk)
        if last is not None:
            yield last
        last = chunk
    if seen.hexdigest() != digest:
        raise DamagedArtifact(if_changed, digest=digest, **values)
    if last is not None:
        yield last
