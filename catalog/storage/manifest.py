"""Manifests of artifacts: a kind, and files with path, size and sha256. A manifest is named by its own sha256.

A manifest may come from a store that others can write to, so a path that could leave its folder is rejected. Readers
see an artifact once the transaction of its owner has committed the row of its manifest.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from typing import Any, ClassVar, cast

import rfc8785
from sqlalchemy import ColumnElement, exists, or_, select
from sqlalchemy.orm import Session

from catalog.db.database import get_once, upsert
from catalog.errors import LorryError
from catalog.tables.history import Checkpoint
from catalog.tables.storage import UNFINISHED_EXPORTS, Adapter, AdapterExport, Artifact, Prepared

MAX_PATH_CHARS = 256
MAX_FILES = 100_000
DIGEST = re.compile(r"[0-9a-f]{64}")
KIND = re.compile(r"[a-z][a-z0-9_-]{0,31}")


DAMAGED = "artifact_damaged"


class DamagedArtifact(LorryError):
    """A stored file is missing, or its content does not match its digest."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestFile:
    """One file: `path` is relative, with forward slashes; `digest` is the sha256 of its bytes, in hex."""

    path: str
    digest: str
    num_bytes: int

    def __post_init__(self) -> None:
        check_path(self.path)
        check_digest(self.digest)
        if not 0 <= self.num_bytes < 2**53:
            raise DamagedArtifact("manifest_size_invalid", num_bytes=self.num_bytes, path=self.path)

    def as_row(self) -> dict[str, Any]:
        return {"path": self.path, "digest": self.digest, "num_bytes": self.num_bytes}


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Files sorted by path, no path twice, none inside another. Raises DamagedArtifact otherwise."""

    kind: str
    files: tuple[ManifestFile, ...]

    def __post_init__(self) -> None:
        paths = [file.path for file in self.files]
        if not KIND.fullmatch(self.kind):
            raise DamagedArtifact("manifest_kind_invalid", kind=self.kind)
        if len(paths) > MAX_FILES:
            raise DamagedArtifact("manifest_too_long", num_paths=len(paths), max_files=MAX_FILES)
        if paths != sorted(set(paths)):
            twice = next((path for path, following in pairwise(sorted(paths)) if path == following), None)
            if twice is None:
                raise DamagedArtifact("manifest_not_sorted")
            raise DamagedArtifact("manifest_file_twice", twice=twice)
        used = set(paths)
        if inside := next((p for p in paths if any(parent in used for parent in _parents(p))), None):
            raise DamagedArtifact("manifest_folder_is_file", inside=inside)

    @classmethod
    def of(cls, kind: str, files: Iterable[ManifestFile]) -> Manifest:
        """Return a manifest of these files, sorted by path."""
        return cls(kind=kind, files=tuple(sorted(files, key=lambda file: file.path)))

    @classmethod
    def from_rows(cls, kind: str, rows: Iterable[Mapping[str, Any]]) -> Manifest:
        """Return a manifest from the `files` of an Artifact row or of a parsed manifest. Raises DamagedArtifact."""
        try:
            return cls(kind=kind, files=tuple(_file(row) for row in rows))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedArtifact("manifest_entry_invalid") from error

    @classmethod
    def parse(cls, content: bytes) -> Manifest:
        """Return the manifest that a stored object contains. Raises DamagedArtifact."""
        try:
            record = cast(dict[str, Any], json.loads(content))
            return cls.from_rows(record["kind"], record["files"])
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise DamagedArtifact("manifest_not_object") from error

    def as_rows(self) -> list[dict[str, Any]]:
        """Return the files as stored in an Artifact row."""
        return [file.as_row() for file in self.files]

    def canonical(self) -> bytes:
        """Return the RFC 8785 JSON that is stored and digested."""
        return rfc8785.dumps({"files": cast(Any, self.as_rows()), "kind": self.kind})

    @property
    def digest(self) -> str:
        return sha256(self.canonical()).hexdigest()

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    def file(self, path: str) -> ManifestFile | None:
        return next((file for file in self.files if file.path == path), None)


def files_digest(manifest: Mapping[str, Any]) -> str:
    """Return the digest of a base model: the sha256 of the RFC 8785 form of its files, whatever their source."""
    return sha256(rfc8785.dumps(manifest["files"])).hexdigest()


def check_path(path: str) -> None:
    """Raises DamagedArtifact for a path that could lead outside its folder on any operating system."""
    parts = path.split("/")
    odd = any(part in ("", ".", "..") for part in parts) or "\\" in path or (len(path) > 1 and path[1] == ":")
    if odd or len(path) > MAX_PATH_CHARS or any(unicodedata.category(c)[0] == "C" for c in path):
        raise DamagedArtifact("manifest_path_unsafe", path=path[:MAX_PATH_CHARS])


def check_digest(digest: str) -> None:
    if not DIGEST.fullmatch(digest):
        raise DamagedArtifact("digest_invalid", digest=digest[:80])


def _file(row: Mapping[str, Any]) -> ManifestFile:
    path, digest, num_bytes = row["path"], row["digest"], row["num_bytes"]
    if not (isinstance(path, str) and isinstance(digest, str) and type(num_bytes) is int):
        raise TypeError
    return ManifestFile(path=path, digest=digest, num_bytes=num_bytes)


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]


def show_artifact(session: Session, manifest: Manifest, *, now: float) -> str:
    """Make the manifest visible, unless an equal one is visible already. Returns its digest.

    Its row is locked, so that no other transaction hides it before this one has committed a reference to it.
    """
    files = [{"path": f.path, "digest": f.digest, "num_bytes": f.num_bytes} for f in manifest.files]
    row = {"digest": manifest.digest, "kind": manifest.kind, "files": files, "num_bytes": manifest.num_bytes}
    if get_once(session, Artifact, manifest.digest, lock="share") is None:
        upsert(session, Artifact, [{**row, "created_at": now}])
    return manifest.digest


def lock_artifact(session: Session, digest: str) -> Artifact | None:
    """Return the row, locked until the transaction ends, or None if it is hidden."""
    return session.get(Artifact, digest, with_for_update=True)


def hide_unused(session: Session, digest: str) -> bool:
    """Delete the row if no other row refers to it. Garbage collection of the store may then delete its files."""
    session.flush()
    row = lock_artifact(session, digest)
    if row is None or session.scalar(select(Artifact.digest).where(Artifact.digest == digest, _is_used())):
        return False
    session.delete(row)
    return True


def unused_artifacts(session: Session) -> list[str]:
    """Return the digests of visible manifests that no other row refers to."""
    return list(session.scalars(select(Artifact.digest).where(~_is_used()).order_by(Artifact.digest)))


def _is_used() -> ColumnElement[bool]:
    """In a query: a row refers to the artifact. A deleted adapter keeps the digest but does not need the files."""
    of_adapter = exists().where(Adapter.artifact == Artifact.digest, Adapter.deleted_at.is_(None))
    of_checkpoint = exists().where(Checkpoint.adapter == Artifact.digest)
    is_exported = AdapterExport.status.in_(UNFINISHED_EXPORTS)
    return or_(
        of_adapter,
        of_checkpoint,
        exists().where(AdapterExport.adapter_artifact == Artifact.digest, is_exported),
        *(exists().where(owner.artifact == Artifact.digest) for owner in (Checkpoint, Prepared, AdapterExport)),
    )
