"""Which objects of the store the record names, and copying them: each is read by its digest on the way."""

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
"""Objects that are read or copied at once: what a bucket takes to answer is waited for side by side."""
Keys = list[str]
"""Of objects in the store: blobs, then manifests, for what names others is written last."""


def named(session: Session) -> Keys:
    """Objects of all that is visible, and of the files and parts of uploads that are still wanted."""
    artifacts = session.execute(select(Artifact.digest, Artifact.files)).all()
    blobs = garbage_collection.wanted_files(session)
    blobs.update(file["digest"] for artifact in artifacts for file in artifact.files)
    manifests = sorted(artifact.digest for artifact in artifacts)
    return [*map(blob_key, sorted(blobs)), *map(manifest_key, manifests)]


def digest_of(key: str) -> str:
    """The sha256 that an object's content must have."""
    return key.rpartition("/")[2].removesuffix(".json")


def stored(objects: Objects) -> set[str]:
    """Keys of all objects that a store holds."""
    return {entry.key for prefix in ("blobs", "manifests") for entry in objects.list_all(prefix)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Copier:
    """From one store to another, by way of `spool_dir` where an object is large."""

    source: Objects
    target: Objects
    there: set[str]
    """Keys that the target has: it gets those that were copied."""
    spool_dir: Path

    def copy(self, keys: Keys) -> dict[str, str]:
        """Copy those that are not there. Returns what is wrong, by key: those objects are not copied.

        Raises Unavailable and OutOfSpace.
        """
        missing = [key for key in keys if key not in self.there]
        blobs = _each([key for key in missing if key.startswith("blobs/")], self._copy_one)
        return blobs | _each([key for key in missing if not key.startswith("blobs/")], self._copy_one)

    def _copy_one(self, key: str) -> None:
        """Whole before it is written: the library can't read one object while it writes another."""
        with full_disk_named(), SpooledTemporaryFile(max_size=CHUNK_BYTES, dir=str(self.spool_dir)) as spool:
            for chunk in verified(read_stored(self.source, key), digest_of(key)):
                spool.write(chunk)
            spool.seek(0)
            self.target.put(key, iter(lambda: spool.read(CHUNK_BYTES), b""))
        self.there.add(key)


def damaged(keys: Keys, objects: Objects) -> dict[str, str]:
    """Read all of them. What is wrong, by key. Raises Unavailable."""

    def one(key: str) -> None:
        for _ in verified(read_stored(objects, key), digest_of(key)):
            pass

    return _each(keys, one)


def _each(keys: Iterable[str], act: Callable[[str], None]) -> dict[str, str]:
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
