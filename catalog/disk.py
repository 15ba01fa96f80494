"""Detects a full disk. Code that writes files under the data folder does so inside `full_disk_named`."""

from __future__ import annotations

import errno
import re
import sqlite3
from collections.abc import Generator
from contextlib import contextmanager

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
