"""A child that ends when its parent does, however the parent ends.

Two ropes. The kernel kills a direct child (`python -m worker.tether PARENT SANDBOX ARGV…` asks for it, then
applies the sandbox and becomes ARGV). A trainer holds the read end of a pipe as its standard input, the only descriptor
that launchers hand on: it exits when that closes, or when the parent sends no byte for too long.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Sequence

from worker.clock import boot_seconds
from worker.sandbox import REFUSAL, REFUSED, Sandbox, apply

PR_SET_PDEATHSIG = 1
UNCONFINED = "-"
"""In the place of a sandbox: a worker itself has none."""
OPTION = "--tethered="
LOST_PARENT = 113
"""Exit status of a trainer whose parent has gone, or has shown no sign of life."""


def tethered(argv: Sequence[str], sandbox: Sandbox | None = None) -> list[str]:
    """`argv` as a command that the kernel kills when the calling thread ends, and confines to the sandbox."""
    confinement = UNCONFINED if sandbox is None else sandbox.as_argument()
    return [sys.executable, "-m", "worker.tether", str(os.getpid()), confinement, *argv]


def die_with_parent() -> None:
    """Be killed by the kernel when the thread that started this process ends. Linux only; else nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def hold_on(argv: Sequence[str]) -> None:
    """Tie this process to its parent if `argv` says `--tethered=SECONDS`: end after so long without a byte.

    Of several processes that one launcher has started the first reads the pipe, for a byte goes to one reader; the
    others watch for its end, and end with their launcher, which ends when the first does.
    """
    for argument in argv:
        if argument.startswith(OPTION):
            die_with_parent()
            if not is_first():
                watch_end(sys.stdin.fileno())
            else:
                watch_pipe(sys.stdin.fileno(), silence_seconds=float(argument.removeprefix(OPTION)))


def is_first() -> bool:
    """Of the processes that one launcher has started here; true of one that was started alone."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def watch_pipe(descriptor: int, *, silence_seconds: float | None) -> threading.Thread:
    """Start the thread that ends this process when the pipe closes, or says nothing for so long."""
    since = descriptor, silence_seconds, boot_seconds()
    thread = threading.Thread(target=_watch, args=since, name="tether", daemon=True)
    thread.start()
    return thread


def watch_end(descriptor: int) -> threading.Thread:
    """Start the thread that ends this process when the pipe closes; it takes no byte from who reads it."""
    thread = threading.Thread(target=_watch_end, args=(descriptor,), name="tether", daemon=True)
    thread.start()
    return thread


def _watch_end(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, 0)  # of itself it tells when the other end has gone
    poll.poll()
    os._exit(LOST_PARENT)


def _watch(descriptor: int, silence_seconds: float | None, heard_at: float) -> None:
    """A machine that was suspended for longer than the silence wakes up with bytes of before in the pipe: they are no
    sign of life, for the lease has ended meanwhile."""
    while True:
        readable, _, _ = select.select([descriptor], [], [], silence_seconds)
        is_silent = silence_seconds is not None and boot_seconds() - heard_at > silence_seconds
        if not readable or is_silent or not os.read(descriptor, 4096):
            os._exit(LOST_PARENT)
        heard_at = boot_seconds()


def main(arguments: Sequence[str]) -> None:
    """Become `arguments[2:]` in the sandbox `arguments[1]`, unless the parent, whose process id is `arguments[0]`, has
    gone already. Ends with REFUSED where the sandbox can't be applied."""
    die_with_parent()
    parent, confinement, *argv = arguments
    if os.getppid() != int(parent):
        os._exit(LOST_PARENT)
    if confinement != UNCONFINED:
        try:
            apply(Sandbox.of_argument(confinement))
        except OSError as error:
            sys.stderr.write(f"{REFUSAL}{error}\n")
            sys.exit(REFUSED)
    os.execv(argv[0], argv)  # noqa: S606  (a list of arguments, ours)


if __name__ == "__main__":
    main(sys.argv[1:])
