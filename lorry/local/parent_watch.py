"""Runs a child that dies with its parent: `python parent_watch.py PARENT ARGV…` becomes ARGV, tied to process PARENT.

`python parent_watch.py --group PARENT ARGV…` stays and runs ARGV instead. When either ARGV or PARENT ends, it kills its
process group, so that no child of ARGV is left.

Used for the processes of the service and of a worker. Run as a script, it imports nothing of this package, so it costs
only a few milliseconds. Only Linux can kill a child this way; elsewhere the child survives a parent that is killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

_PR_SET_PDEATHSIG = 1
LOST_PARENT = 113
"""Exit status of a process whose parent has died."""


def dying_with_parent(argv: Sequence[str]) -> list[str]:
    """Return a command that runs `argv`, and that the kernel kills when the calling thread ends."""
    return [sys.executable, "-I", __file__, str(os.getpid()), *argv]


def group_dying_with_parent(argv: Sequence[str]) -> list[str]:
    """Return a command that runs `argv`, and whose process group ends with `argv` or with the calling thread. The
    command must be started in a session of its own."""
    return [sys.executable, "-I", __file__, "--group", str(os.getpid()), *argv]


def die_with_parent(parent: int | None = None) -> None:
    """Make the kernel kill this process when the thread that started it ends. Exit if `parent`, the id of the expected
    parent process, has already died."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(LOST_PARENT)


def _run_group(parent: int, argv: Sequence[str]) -> None:
    """Run `argv`, pass SIGTERM on to it, and kill the process group when it ends. Does not return."""
    import subprocess

    process: subprocess.Popen[bytes] | None = None

    def stop(_number: int, _frame: FrameType | None) -> None:
        if process is None or os.getppid() != parent:
            os.killpg(0, signal.SIGKILL)
        else:
            process.terminate()

    signal.signal(signal.SIGTERM, stop)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(LOST_PARENT)
    process = subprocess.Popen(argv)
    sys.stdout.write(f"The process ended with status {process.wait()}.\n")
    sys.stdout.flush()
    os.killpg(0, signal.SIGKILL)


def main(arguments: Sequence[str]) -> None:
    if arguments[0] == "--group":
        _run_group(int(arguments[1]), arguments[2:])
    die_with_parent(int(arguments[0]))
    os.execv(arguments[1], list(arguments[1:]))  # noqa: S606 - no shell is needed


if __name__ == "__main__":
    main(sys.argv[1:])
