"""Lists the objects that the database refers to, and copies them between stores. Each copy verifies the digest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import SpooledTemporaryFile

from sqlalchemy import select
from sqlalchemy.orm import Session

from catalog.disk import full_disk_named
from catalog.maintenance import garbage_collection
from catalog.storage.manifest import DamagedArtifact
from catalog.storage.object_storage import CHUNK_BYTES, NoSuchObject, Objects
from catalog.storage.store import blob_key, manifest_key, read_stored, verified
from catalog.tables.storage import Artifact

AT_ONCE = 8
"""Number of objects that are read or copied concurrently, to hide the latency of a bucket."""
Keys = list[str]
"""Keys of objects in the store: blobs first, then the manifests that refer to them."""


def named(session: Session) -> Keys:
    """Return the keys of all objects in use: visible artifacts with their manifests, files, logs and upload parts."""
    artifacts = session.execute(select(Artifact.digest, Artifact.files)).all()
    blobs = garbage_collection.wanted_files(session)
    blobs.update(file["digest"] for artifact in artifacts for file in artifact.files)
    manifests = sorted(artifact.digest for artifact in artifacts)
    return [*map(blob_key, sorted(blobs)), *map(manifest_key, manifests)]


def digest_of(key: str) -> str:
    """Return the SHA-256 digest that the object's content must have."""
    return key.rpartition("/")[2].removesuffix(".json")


def stored(objects: Objects) -> set[str]:
    """Return the keys of all objects in a store."""
    return {entry.key for prefix in ("blobs", "manifests") for entry in objects.list_all(prefix)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Copier:
    """Copies objects from one store to another. Large objects are spooled in `spool_dir`."""

    source: Objects
    target: Objects
    existing: set[str]
    """Keys of the objects in the target. `copy` adds to it."""
    spool_dir: Path

    def copy(self, keys: Keys) -> dict[str, str]:
        """Copy the objects that the target lacks. Returns problems by key; these objects are not copied.

        Raises Unavailable and OutOfSpace.
        """
        missing = [key for key in keys if key not in self.existing]
        blobs = _each([key for key in missing if key.startswith("blobs/")], self._copy_one)
        return blobs | _each([key for key in missing if not key.startswith("blobs/")], self._copy_one)

    def _copy_one(self, key: str) -> None:
        """Copy one object. It is read completely first: the library can't read one object while it writes another."""
        with full_disk_named(), SpooledTemporaryFile(max_size=CHUNK_BYTES, dir=str(self.spool_dir)) as spool:
            for chunk in verified(read_stored(self.source, key), digest_of(key)):
                spool.write(chunk)
            spool.seek(0)
            self.target.put(key, iter(lambda: spool.read(CHUNK_BYTES), b""))
        self.existing.add(key)


def damaged(keys: Keys, objects: Objects) -> dict[str, str]:
    """Read all of these objects, and return problems by key. Raises Unavailable."""

    def one(key: str) -> None:
        for _ in verified(read_stored(objects, key), digest_of(key)):
            pass

    return _each(keys, one)


def _each(keys: Iterable[str], act: Callable[[str], None]) -> dict[str, str]:
    """Call `act` for all keys in threads. Returns problems (missing or changed objects) by key."""

    def tried(key: str) -> tuple[str, str | None]:
        try:
            act(key)
        except NoSuchObject:
            return key, f"{key} is missing."
        except DamagedArtifact:
            return key, f"The content of {key} has changed."
        return key, None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return {key: problem for key, problem in pool.map(tried, keys) if problem is not None}
