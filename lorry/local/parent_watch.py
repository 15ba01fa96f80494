"""`python parent_watch.py PARENT ARGV…` becomes ARGV, as a process that the kernel kills when PARENT dies. Linux only.

Run as a file: it imports nothing of this package, so that it costs a few milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_LOST_PARENT = 113


def main(arguments: Sequence[str]) -> None:
    """A parent that died before the kernel was asked is noticed as well."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(arguments[0]):
        os._exit(_LOST_PARENT)
    os.execv(arguments[1], list(arguments[1:]))  # noqa: S606 - no shell is what we want


if __name__ == "__main__":
    main(sys.argv[1:])
