"""Processes that hold secrets are closed to other processes of the same user."""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_DUMPABLE = 4


def deny_inspection() -> None:
    """Make this process, and those that it forks, unreadable to all but root: its environment (/proc/PID/environ), its
    memory and its open files. It leaves no core dump either. A program that it starts is readable again. Linux only.
    Raises OSError."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"prctl(PR_SET_DUMPABLE): {os.strerror(number)}")
