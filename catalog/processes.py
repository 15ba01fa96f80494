"""How a child process exited, for error messages, and the protection of a process that holds secrets."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_DUMPABLE = 4


def how_it_exited(returncode: int) -> str:
    """Return a predicate about a process that exited without a result. returncode: negative for a signal."""
    if returncode == 0:
        return "exited without a result"
    if returncode > 0:
        return f"failed with exit status {returncode}"
    number = -returncode
    name = f" ({signal.Signals(number).name})" if number in set(signal.Signals) else ""
    return f"was killed by signal {number}{name}"


def is_killed(returncode: int) -> bool:
    """Return whether SIGKILL ended the process, usually because the machine ran out of memory."""
    return returncode == -signal.SIGKILL


def deny_inspection() -> None:
    """Make this process and its forks unreadable for every user except root.

    This covers the environment (/proc/PID/environ), memory and open files, and disables core dumps. A program that
    the process executes is readable again. Linux only. Raises OSError.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"prctl(PR_SET_DUMPABLE): {os.strerror(number)}")
