"""Writes files and folders that survive a power failure: fsync of the file, and of each folder with its name."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """fsync a file, or a folder and therefore the names in it. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path, *, mode: int = 0o777) -> None:
    """Create a folder and its missing parents. They survive a power failure after the return. Raises OSError.

    mode: mode of the folder itself. Its parents get the default mode, as with `Path.mkdir`.
    """
    missing = [folder for folder in (path.absolute(), *path.absolute().parents) if not folder.exists()]
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)
