"""Describes how a child process exited, for error messages."""

from __future__ import annotations

import signal


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
