"""The files of deployed adapters, from which the inference server loads them.

Each endpoint has a folder of its own in its adapter folder, which endpoints of several services may share. Its name
contains the ids of service and endpoint, so a service recognizes what it has loaded. An adapter's folder in it is named
by adapter and content, so a server that caches by path never mixes two contents.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory

from catalog.errors import InvalidRequest
from catalog.storage.manifest import Manifest, ManifestFile
from catalog.storage.object_storage import CHUNK_BYTES
from catalog.storage.store import ArtifactStore

SERVED_PATH = re.compile(r"/(?:.*/)?lorry-([0-9a-f]{24})-(endpoint-[0-9a-f]{24})/adapter-[0-9a-f]{24}-[0-9a-f]{12}")
"""Paths that `endpoint_folder` and `adapter_path` return, of any service."""

REMOVED = ".removed-"
"""Prefix of folders that are being removed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterOrigin:
    """The service and the endpoint for which an adapter was written."""

    service_id: str
    endpoint_id: str


def check_folder(folder: str) -> None:
    """Raises InvalidRequest if this API server can't write adapters into the folder."""
    path = Path(folder)
    problem = None
    if not path.is_absolute() or ".." in path.parts or "\x00" in folder:
        problem = "is not an absolute path"
    elif not path.is_dir():
        problem = "does not exist on this API server, or is not a folder"
    elif not os.access(path, os.W_OK | os.X_OK):
        problem = "is not writable for this API server"
    if problem is not None:
        raise InvalidRequest("invalid_adapter_folder", folder=folder[:200], problem=problem, param="adapter_folder")


def endpoint_folder(adapter_folder: str, *, service_id: str, endpoint_id: str) -> Path:
    return Path(adapter_folder) / f"lorry-{service_id}-{endpoint_id}"


def adapter_path(folder: Path, *, adapter_id: str, manifest: Manifest) -> Path:
    """folder: of the endpoint."""
    return folder / f"{adapter_id}-{manifest.digest[:12]}"


def origin_of(path: str) -> AdapterOrigin | None:
    """Return for which service and endpoint an adapter was written, or None if no Lorry service has written it."""
    found = SERVED_PATH.fullmatch(path)
    return None if found is None else AdapterOrigin(service_id=found[1], endpoint_id=found[2])


def put(store: ArtifactStore, path: Path, manifest: Manifest, *, check: Callable[[], None]) -> None:
    """Write the adapter's files to the folder `path`, unless they are there and match their digests.

    check: raises an exception if another process may keep the endpoint. It is called for each chunk. A copy that
    continues nevertheless replaces files only by the same content, because `path` names it, and each file at once.
    Raises OSError, OutOfSpace, Unavailable and DamagedArtifact.
    """
    if path.is_dir() and all(_matches(path / file.path, file) for file in manifest.files):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        fetched = Path(temporary) / path.name
        store.fetch(manifest, fetched, check=check)
        path.parent.chmod(0o755)
        for parent, _, names in os.walk(fetched):  # the inference server may run as another user
            Path(parent).chmod(0o755)
            for name in names:
                (Path(parent) / name).chmod(0o644)
        check()
        try:
            fetched.rename(path)
        except OSError:
            if not path.is_dir():
                raise
            _replace_files(path, fetched, manifest)


def remove_others(folder: Path, kept: set[str], *, check: Callable[[], None]) -> None:
    """Remove the folders of adapters that are not deployed any more. kept: names of folders to keep; empty: none.

    check: as for `put`, called before each removal. Each folder is renamed first, so that a process that keeps the
    endpoint later never finds a part of it. Symbolic links are removed, not followed: another program may have written
    them.
    """
    if not kept or folder.is_symlink():
        _remove(folder, check=check)
        return
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name.startswith(REMOVED):  # by a process that was killed
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name not in kept and not entry.name.startswith("."):  # such a folder is being written or removed
            _remove(entry, check=check)


def _replace_files(path: Path, fetched: Path, manifest: Manifest) -> None:
    """Replace the files in `path` one by one, and those that match stay. Another process may do the same."""
    for file in manifest.files:
        if not _matches(path / file.path, file):
            (path / file.path).parent.mkdir(parents=True, exist_ok=True)
            (fetched / file.path).replace(path / file.path)


def _remove(folder: Path, *, check: Callable[[], None]) -> None:
    removed = folder.with_name(f"{REMOVED}{folder.name}.{token_hex(4)}")
    check()
    with suppress(FileNotFoundError):
        folder.rename(removed)
    if removed.is_symlink():
        removed.unlink()
    shutil.rmtree(removed, ignore_errors=True)


def _matches(path: Path, file: ManifestFile) -> bool:
    digest = sha256()
    try:
        if path.is_symlink() or path.stat().st_size != file.num_bytes:
            return False
        with path.open("rb") as content:
            while chunk := content.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError:
        return False
    return digest.hexdigest() == file.digest
