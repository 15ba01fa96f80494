"""Writes files and folders that survive a power failure, and detects a full disk.

Code that writes files under the data folder does so inside `full_disk_named`.
"""

from __future__ import annotations

import errno
import os
import re
import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from catalog.errors import OutOfSpace

FULL = (errno.ENOSPC, errno.EDQUOT)
_IN_TEXT = re.compile(rf"(os error |\[Errno )({errno.ENOSPC}|{errno.EDQUOT})\b")
"""Matches the error texts of Rust libraries ("os error 28") and of Python ("[Errno 28]")."""


@contextmanager
def full_disk_named() -> Generator[None]:
    """Raises OutOfSpace for an error that means a full disk or quota. Other errors propagate unchanged."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        if is_full(error):
            raise out_of_space("the data folder") from error
        raise


def is_full(error: BaseException) -> bool:
    is_of_sqlite = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return is_of_sqlite or getattr(error, "errno", None) in FULL or tells_of_full(str(error))


def tells_of_full(text: str) -> bool:
    """Return whether the last output of a process reports a full disk or quota."""
    return _IN_TEXT.search(text) is not None


def out_of_space(place: str = "the data folder or the artifact store") -> OutOfSpace:
    return OutOfSpace("out_of_space", place=place)


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
