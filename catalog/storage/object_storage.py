"""Objects by key in a folder or a bucket. Only this module uses obstore, whose errors it translates.

Writes are atomic. Objects are read in ranges, so that no request exceeds its time limit, whatever the size.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, url2pathname, urlopen

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, ObjectStore, S3Store, from_url

from catalog import disk
from catalog.disk import is_full, out_of_space
from catalog.errors import InvalidRequest, OutOfSpace, Unavailable

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

CHUNK_BYTES = 8 * 2**20
RETRY: RetryConfig = {"max_retries": 5, "retry_timeout": timedelta(seconds=30)}
PROBE = "clock"
"""Key of the object that is written to read a bucket's clock."""
STORE_SETTING = "the location in LORRY_STORE_URL (default: the folder `store` in the data folder)"
DENIED = (PermissionError, PermissionDeniedError, UnauthenticatedError)
NO_SUCH_BUCKET = "<Code>NoSuchBucket</Code>"
AWS = re.compile(r"\.amazonaws\.com(\.cn)?$")
"""Host names of AWS. A bucket there needs choices that are the operator's: region, encryption, public access."""
STAGED = re.compile(r".*#\d+")
"""Name pattern of local files that obstore has not finished writing."""


class NoSuchObject(Exception):
    """No object has this key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredObject:
    """Metadata of one stored object; `written_at` is in seconds since 1970 by the store's clock."""

    key: str
    num_bytes: int
    written_at: float


def create_missing_bucket(url: str) -> None:
    """Create the bucket of an s3:// URL if it does not exist, except in AWS. Other URLs are ignored.

    Raises InvalidRequest if it does not exist and can't be created, and Unavailable.
    """
    if urlsplit(url).scheme != "s3" or _bucket_exists(url):
        return
    name = urlsplit(url).netloc
    # obstore creates no buckets. With this option, its URLs contain keys, but not the bucket: the key is the bucket.
    service = S3Store(bucket=name, virtual_hosted_style_request=True, client_options=_client_options())
    with _translated_at("The artifact store", STORE_SETTING, None):
        signed = obstore.sign(service, "PUT", name, timedelta(minutes=5))
        if AWS.search(urlsplit(signed).hostname or ""):
            raise InvalidRequest("aws_bucket_missing", name=name)
        try:
            urlopen(Request(signed, method="PUT"), timeout=60).close()  # noqa: S310  (the address of the store)
        except HTTPError as error:
            error.close()
            if _bucket_exists(url):  # another process has created it at the same time
                return
            raise InvalidRequest("bucket_not_created", name=name, error=str(error)) from error


def _bucket_exists(url: str) -> bool:
    """Raises Unavailable."""
    try:
        with _translated_at("The artifact store", STORE_SETTING, None):
            next(iter(cast(Any, obstore).list(_open(url, None), chunk_size=1)), None)
    except Unavailable as error:
        if NO_SUCH_BUCKET not in str(error.__cause__):
            raise
        return False
    return True


class Objects:
    """Bytes by key. `url`: file:///folder, or s3://bucket/prefix with AWS_… from the environment.

    name, checked: for errors, what can't be accessed, and what to check then.
    """

    def __init__(self, url: str, *, name: str = "The artifact store", checked: str = STORE_SETTING) -> None:
        self._name, self._checked = name, checked
        self.folder = _folder(url)
        self._synced: set[Path] = set()
        with self._translated():
            if self.folder is not None:
                disk.make_folder(self.folder)
            self._store = _open(url, self.folder)

    def put(self, key: str, chunks: bytes | Iterable[bytes]) -> None:
        """Write the object atomically. If `chunks` raises, nothing is written."""
        with self._translated():
            obstore.put(self._store, key, chunks, chunk_size=CHUNK_BYTES, max_concurrency=2)
            self._sync(key)

    def create(self, key: str, content: bytes) -> bool:
        """Write the object unless the key exists. Returns whether it was written; of concurrent calls, one succeeds."""
        with self._translated():
            try:
                obstore.put(self._store, key, content, mode="create")
            except AlreadyExistsError:
                return False
            self._sync(key)
        return True

    def now(self) -> float:
        """Return the time of the store's clock in seconds since 1970. Writes to the store.

        The age of an object is valid only by this clock. For a folder, it is the clock of its file system, and reading
        it needs no space. For a bucket, it is the time at which the bucket stores the object PROBE. If the bucket is
        full, the time of the last such object is returned, which is earlier. Raises OutOfSpace if there is none, and
        Unavailable.
        """
        if self.folder is not None:
            with self._translated():
                os.utime(self.folder)
                return self.folder.stat().st_mtime
        try:
            self.put(PROBE, b"")
        except OutOfSpace as error:
            try:
                return self.head(PROBE).written_at
            except NoSuchObject:
                raise error from None
        return self.head(PROBE).written_at

    def head(self, key: str) -> StoredObject:
        """Return the object's metadata. Raises NoSuchObject."""
        with self._translated(key):
            return _entry(obstore.head(self._store, key))

    def read(self, key: str, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Yield chunks of at most `chunk_bytes`. Raises NoSuchObject at the call, not at the first chunk."""
        return self._ranges(key, self.head(key).num_bytes, chunk_bytes)

    def _ranges(self, key: str, num_bytes: int, chunk_bytes: int) -> Iterator[bytes]:
        for start in range(0, num_bytes, chunk_bytes):
            with self._translated(key):
                chunk = obstore.get_range(self._store, key, start=start, end=min(start + chunk_bytes, num_bytes))
            yield bytes(chunk)

    def list_all(self, prefix: str) -> Iterator[StoredObject]:
        with self._translated():
            for batch in cast(Any, obstore).list(self._store, prefix):
                yield from map(_entry, batch)

    def delete(self, key: str) -> None:
        with self._translated(key):
            obstore.delete(self._store, key)

    def move(self, key: str, target: str) -> None:
        """Rename the object, replacing `target` if it exists. A bucket copies, then deletes. Raises NoSuchObject."""
        with self._translated(key):
            obstore.rename(self._store, key, target)
            self._sync(target)

    def _sync(self, key: str) -> None:
        """Sync a finished file so that it survives a power failure: its content and name, once also its folders'."""
        if self.folder is None:
            return
        path = self.folder / key
        disk.sync(path)
        disk.sync(path.parent)
        above = [folder for folder in path.parent.parents if folder.is_relative_to(self.folder)]
        for folder in (folder for folder in above if path.parent not in self._synced):
            disk.sync(folder)
        self._synced.add(path.parent)

    def _translated(self, key: str = "") -> AbstractContextManager[None]:
        return _translated_at(self._name, self._checked, self.folder, key=key)

    def delete_staged(self, *, older_than: float) -> None:
        """Delete unfinished files that killed writers have left in a local folder.

        In a bucket these are incomplete multipart uploads, which its lifecycle rule removes.
        """
        if self.folder is None:
            return
        for path in self.folder.rglob("*#*"):
            if STAGED.fullmatch(path.name) and path.stat().st_mtime < older_than:
                path.unlink(missing_ok=True)


@contextmanager
def _translated_at(name: str, checked: str, folder: Path | None, *, key: str = "") -> Generator[None]:
    """Translate errors of obstore and of the system to NoSuchObject, OutOfSpace and Unavailable."""
    try:
        yield
    except FileNotFoundError as error:
        raise NoSuchObject(key) from error
    except (BaseError, OSError) as error:
        if is_full(error):
            raise out_of_space(name[0].lower() + name[1:]) from error
        if isinstance(error, DENIED):
            if folder is None:
                raise Unavailable("store_access_denied", name=name, checked=checked) from error
            raise Unavailable(
                "store_folder_denied", name=name, user_id=os.geteuid(), folder=str(folder), checked=checked
            ) from error
        reason = getattr(error, "strerror", None)
        if reason:
            raise Unavailable("store_unavailable", name=name, reason=reason, checked=checked) from error
        raise Unavailable("store_unavailable_unknown_reason", name=name, checked=checked) from error


def _folder(url: str) -> Path | None:
    parts = urlsplit(url)
    return Path(url2pathname(parts.path)) if parts.scheme == "file" else None


def _open(url: str, folder: Path | None) -> ObjectStore:
    if folder is not None:
        return LocalStore(folder, mkdir=True)
    return from_url(url, client_options=_client_options(), retry_config=RETRY)


def _client_options() -> ClientConfig:
    plain = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("true", "1")
    return {"connect_timeout": timedelta(seconds=5), "timeout": timedelta(seconds=60), "allow_http": plain}


def _entry(meta: Any) -> StoredObject:
    return StoredObject(key=meta["path"], num_bytes=meta["size"], written_at=meta["last_modified"].timestamp())
