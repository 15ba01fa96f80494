"""The files of deployed adapters, from which the inference server loads them.

Each endpoint has a folder of its own in its adapter folder, which endpoints may share. An adapter's folder in it is
named by adapter and content, so a server that caches by path never mixes two contents.
"""

from __future__ import annotations

import os
import re
import shutil
from hashlib import sha256
from pathlib import Path

from catalog.errors import InvalidRequest
from catalog.storage.manifest import Manifest, ManifestFile
from catalog.storage.object_storage import CHUNK_BYTES
from catalog.storage.store import ArtifactStore

OWN_PATH = re.compile(r"/(?:.*/)?lorry-(endpoint-[0-9a-f]{24})/adapter-[0-9a-f]{24}-[0-9a-f]{12}")
"""Paths that `endpoint_folder` and `adapter_path` return."""


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
        raise InvalidRequest(
            f"The adapter folder {folder[:200]!r} {problem}.",
            code="invalid_adapter_folder",
            remedy="Use the absolute path of a folder that each API server and the inference server see at the same "
            "path. API servers write to it.",
            param="adapter_folder",
        )


def endpoint_folder(adapter_folder: str, endpoint_id: str) -> Path:
    return Path(adapter_folder) / f"lorry-{endpoint_id}"


def adapter_path(folder: Path, *, adapter_id: str, manifest: Manifest) -> Path:
    """folder: of the endpoint."""
    return folder / f"{adapter_id}-{manifest.digest[:12]}"


def endpoint_of(path: str) -> str | None:
    """Return the id of the endpoint for which Lorry has written an adapter, or None if the path is not Lorry's."""
    found = OWN_PATH.fullmatch(path)
    return None if found is None else found[1]


def put(store: ArtifactStore, path: Path, manifest: Manifest) -> None:
    """Write the adapter's files to the folder `path`, unless they are there and match their digests.

    Raises OSError, OutOfSpace, Unavailable and DamagedArtifact.
    """
    if path.is_dir() and all(_matches(path / file.path, file) for file in manifest.files):
        return
    shutil.rmtree(path, ignore_errors=True)
    store.fetch(manifest, path)
    path.parent.chmod(0o755)
    for parent, _, names in os.walk(path):  # the inference server may run as another user
        Path(parent).chmod(0o755)
        for name in names:
            (Path(parent) / name).chmod(0o644)


def remove_others(folder: Path, kept: set[str]) -> None:
    """Remove the folders of adapters that are not deployed any more. kept: names of folders to keep; empty: none."""
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name not in kept and not entry.name.startswith("."):  # such a folder is being written
            shutil.rmtree(entry, ignore_errors=True)


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
