"""How a child process tells its parent of an error: code, message and remedy."""

from __future__ import annotations

import errno
import faulthandler
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import Protocol

OUT_OF_SPACE = "out_of_space"
FULL_DISK = {
    "code": OUT_OF_SPACE,
    "message": "The worker's disk is full.",
    "remedy": "Free space under the worker's data folder; what waits for it goes on by itself.",
}


class ReportedError(Protocol):
    """One that is meant for a person, be it the engine's or the preparation's."""

    code: str
    message: str
    remedy: str


def described(error: ReportedError) -> dict[str, str]:
    return {"code": error.code, "message": error.message, "remedy": error.remedy}


def disk_error(error: OSError) -> dict[str, str]:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return dict(FULL_DISK)
    remedy = "Look at the worker's disk; what waits for it goes on by itself."
    return {"code": "disk_error", "message": f"The worker's disk failed: {error.strerror}.", "remedy": remedy}


def error_report(error: OSError | ReportedError) -> dict[str, str]:
    """Of either kind."""
    return disk_error(error) if isinstance(error, OSError) else described(error)


MARK = "handled| "
MARKED = re.compile(rf"^(?:\[rank\d+\]: )?{re.escape(MARK)}.*\n?", re.MULTILINE)


def print_handled(error: BaseException) -> None:
    """Its traceback, to the process's log."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    sys.stderr.write("".join(f"{MARK}{line}\n" for line in lines))
    sys.stderr.flush()


def without_handled(log: str) -> str:
    return MARKED.sub("", log)


ASKED_BY = signal.SIGUSR1
"""All that a process's threads are doing is printed, and it goes on."""


def rank_log(directory: Path, rank: int) -> Path:
    """log.txt is that of the first process and of what has launched them, log-1.txt that of the next."""
    return directory / ("log.txt" if rank == 0 else f"log-{rank}.txt")


def begin_rank_log(directory: str) -> None:
    """The first process goes on with what its launcher prints to. A crash by a signal tells its stacks as well."""
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        _print_to(rank_log(Path(directory), rank))
    faulthandler.enable(all_threads=True)
    faulthandler.register(ASKED_BY, all_threads=True, chain=False)


def _print_to(path: Path) -> None:
    """It is appended to, for its worker cuts it where it grows long."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for standard in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(descriptor, standard)
    os.close(descriptor)
