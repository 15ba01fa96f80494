"""Runs a child that dies with its parent: `python parent_watch.py PARENT ARGV…` becomes ARGV, tied to process PARENT.

Used for the processes of the service and of a worker. Run as a script, it imports nothing of this package, so it costs
only a few milliseconds. Only Linux can kill a child this way; elsewhere the child survives a parent that is killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
LOST_PARENT = 113
"""Exit status of a process whose parent has died."""


def dying_with_parent(argv: Sequence[str]) -> list[str]:
    """Return a command that runs `argv`, and that the kernel kills when the calling thread ends."""
    return [sys.executable, "-I", __file__, str(os.getpid()), *argv]


def die_with_parent(parent: int | None = None) -> None:
    """Make the kernel kill this process when the thread that started it ends. Exit if `parent`, the id of the expected
    parent process, has already died."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(LOST_PARENT)


def main(arguments: Sequence[str]) -> None:
    die_with_parent(int(arguments[0]))
    os.execv(arguments[1], list(arguments[1:]))  # noqa: S606 - no shell is needed


if __name__ == "__main__":
    main(sys.argv[1:])
