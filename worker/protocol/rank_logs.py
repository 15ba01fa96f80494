"""The trainer's end of its logs: each process prints to a file of its own, and its stacks when it is asked for them.

Called before torch is imported, so that whatever its import prints, and where it hangs, is there too.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from pathlib import Path

ASKED_BY = signal.SIGUSR1
"""All that a process's threads are doing is printed, and it goes on."""


def log_of(directory: Path, rank: int) -> Path:
    """log.txt is that of the first process and of what has launched them, log-1.txt that of the next."""
    return directory / ("log.txt" if rank == 0 else f"log-{rank}.txt")


def begin(directory: str) -> None:
    """The first process goes on with what its launcher prints to. A crash by a signal tells its stacks as well."""
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        _print_to(log_of(Path(directory), rank))
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
