"""The parts of an upload joined in a file on the API server's disk, which is removed when it has been stored."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from catalog.disk import full_disk_named
from catalog.storage.store import ArtifactStore, Blob
from catalog.tables import UploadPart


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole:
    """The parts of an upload, joined."""

    path: Path
    content: Blob
    md5: str


@contextmanager
def joined(store: ArtifactStore, parts: Sequence[UploadPart], folder: Path) -> Generator[Whole]:
    """One file of all; gone after the block. Its name is that of any spooled upload, which a later start removes."""
    path = folder / f"upload-{secrets.token_hex(12)}"
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    try:
        with full_disk_named():
            folder.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                for chunk in chain.from_iterable(store.open_blob(part.digest) for part in parts):
                    out.write(chunk)
                    sha256.update(chunk)
                    md5.update(chunk)
        content = Blob(digest=sha256.hexdigest(), num_bytes=path.stat().st_size)
        yield Whole(path=path, content=content, md5=md5.hexdigest())
    finally:
        path.unlink(missing_ok=True)
