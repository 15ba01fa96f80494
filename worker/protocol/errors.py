"""How a child process reports an error to its parent: as code, message and remedy, or in its log."""

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

from catalog.error_texts import ErrorText

OUT_OF_SPACE = "out_of_space"
DISK_ERROR = "disk_error"
EXIT_DISK_FULL = 75
"""EX_TEMPFAIL: exit status of a child of a background task that may not have had enough disk space for a message."""


class ReportedError(Protocol):
    """An error that is meant for users, from the engine or from data preparation."""

    code: str
    message: str
    remedy: str


def described(error: ReportedError) -> dict[str, str]:
    return {"code": error.code, "message": error.message, "remedy": error.remedy}


def disk_error(error: OSError) -> dict[str, str]:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ErrorText.of("worker_disk_full").report()
    return ErrorText.of("disk_error", reason=error.strerror or type(error).__name__).report()


def error_report(error: OSError | ReportedError) -> dict[str, str]:
    """Return code, message and remedy of an error of either kind."""
    return disk_error(error) if isinstance(error, OSError) else described(error)


MARK = "handled| "
MARKED = re.compile(rf"^(?:\[rank\d+\]: )?{re.escape(MARK)}.*\n?", re.MULTILINE)


def print_handled(error: BaseException) -> None:
    """Print a traceback to the process's log. A mark on each line distinguishes it from a fatal error."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    sys.stderr.write("".join(f"{MARK}{line}\n" for line in lines))
    sys.stderr.flush()


def without_handled(log: str) -> str:
    return MARKED.sub("", log)


ASKED_BY = signal.SIGUSR1
"""On this signal, a process prints the stacks of all its threads and continues."""


def rank_log(directory: Path, rank: int) -> Path:
    """Return the path of a process's log. The first process and the launcher share log.txt, the next has log-1.txt."""
    return directory / ("log.txt" if rank == 0 else f"log-{rank}.txt")


def begin_rank_log(directory: str) -> None:
    """Redirect the output of this process to its own log. The first process keeps its launcher's log. From now on, a
    crash by a signal prints the stacks of all threads."""
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        _print_to(rank_log(Path(directory), rank))
    faulthandler.enable(all_threads=True)
    faulthandler.register(ASKED_BY, all_threads=True, chain=False)


def _print_to(path: Path) -> None:
    """Redirect standard output and error to the end of a file. Its worker truncates the file when it grows long."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for standard in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(descriptor, standard)
    os.close(descriptor)
