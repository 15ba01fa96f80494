"""A full disk, named: whoever writes a file under the data folder does it inside `full_disk_named`."""

from __future__ import annotations

import errno
import re
from collections.abc import Generator
from contextlib import contextmanager

from catalog.errors import OutOfSpace

FULL = (errno.ENOSPC, errno.EDQUOT)
_IN_TEXT = re.compile(rf"(os error |\[Errno )({errno.ENOSPC}|{errno.EDQUOT})\b")
"""How a library that is not Python's tells it, and Python."""


@contextmanager
def full_disk_named() -> Generator[None]:
    """Raises OutOfSpace for an OSError that means a full disk or quota; lets all others pass."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise out_of_space() from error
        raise


def is_full(error: BaseException) -> bool:
    return getattr(error, "errno", None) in FULL or tells_of_full(str(error))


def tells_of_full(text: str) -> bool:
    """Whether a process's last words do."""
    return _IN_TEXT.search(text) is not None


def out_of_space() -> OutOfSpace:
    return OutOfSpace(
        "The disk, or the quota on it, is full.",
        code="out_of_space",
        remedy="Nothing was kept. Free space under the data folder, then try again.",
    )
