"""How a child process tells its parent of an error: code, message and remedy."""

from __future__ import annotations

import errno
from typing import Protocol

OUT_OF_SPACE = "out_of_space"
FULL_DISK = {
    "code": OUT_OF_SPACE,
    "message": "The worker's disk is full.",
    "remedy": "Free space under the worker's data folder; what waits for it goes on by itself.",
}


class ToldError(Protocol):
    """One that is meant for a person, be it the engine's or the preparation's."""

    code: str
    message: str
    remedy: str


def described(error: ToldError) -> dict[str, str]:
    return {"code": error.code, "message": error.message, "remedy": error.remedy}


def disk_error(error: OSError) -> dict[str, str]:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return dict(FULL_DISK)
    remedy = "Look at the worker's disk; what waits for it goes on by itself."
    return {"code": "disk_error", "message": f"The worker's disk failed: {error.strerror}.", "remedy": remedy}


def told(error: OSError | ToldError) -> dict[str, str]:
    """Of either kind."""
    return disk_error(error) if isinstance(error, OSError) else described(error)
