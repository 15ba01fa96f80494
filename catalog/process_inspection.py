"""Protects processes that hold secrets from other processes of the same user."""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_DUMPABLE = 4


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
