"""Confines the child processes of a worker, and ends them together with it.

The kernel kills a direct child whose worker dies (`lorry.local.parent_watch`). This module also confines the child:
`python -m worker.process.confined_child PARENT SANDBOX ARGV…` applies the sandbox and becomes ARGV.

A trainer holds a lease in addition. The read end of a pipe is its standard input, which is the only descriptor that
launchers pass on. The trainer exits when the pipe closes, or when the worker sends no heartbeat through it for too
long.
"""

from __future__ import annotations

import os
import select
import struct
import sys
import threading
from collections.abc import Sequence

from catalog.clock import boot_seconds
from lorry.local.parent_watch import LOST_PARENT, die_with_parent
from worker.process.sandbox import REFUSAL, REFUSED, Sandbox, apply

OPTION = "--tethered="
SIGN = struct.Struct("=d")
"""A heartbeat: the `boot_seconds` at which it began in the parent. Writing so few bytes to a pipe is atomic."""
PIPE_BYTES = 2**16


def confined(argv: Sequence[str], sandbox: Sandbox) -> list[str]:
    """Return a command that runs `argv` in the sandbox. The kernel kills it when the calling thread ends."""
    return [sys.executable, "-m", "worker.process.confined_child", str(os.getpid()), sandbox.as_argument(), *argv]


def exit_without_parent(argv: Sequence[str]) -> None:
    """Tie this process to its parent if `argv` contains `--tethered=SECONDS`: exit after SECONDS without a heartbeat.

    If one launcher has started several processes, only the first reads the pipe, because each heartbeat goes to one
    reader. The others watch for the pipe to close. They also exit with their launcher, which exits when the first
    process does.
    """
    for argument in argv:
        if argument.startswith(OPTION):
            die_with_parent()
            if not is_first():
                watch_end(sys.stdin.fileno())
            else:
                watch_pipe(sys.stdin.fileno(), silence_seconds=float(argument.removeprefix(OPTION)))


def is_first() -> bool:
    """Return whether this is the first process of its launcher on this machine. True without a launcher."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def watch_pipe(descriptor: int, *, silence_seconds: float) -> threading.Thread:
    """Start a thread that exits this process when the pipe closes, or brings no heartbeat for `silence_seconds`."""
    since = descriptor, silence_seconds, boot_seconds()
    thread = threading.Thread(target=_watch, args=since, name="tether", daemon=True)
    thread.start()
    return thread


def watch_end(descriptor: int) -> threading.Thread:
    """Start a thread that exits this process when the pipe closes. It reads nothing."""
    thread = threading.Thread(target=_watch_end, args=(descriptor,), name="tether", daemon=True)
    thread.start()
    return thread


def _watch_end(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, 0)  # poll always reports POLLHUP, so no event is requested
    poll.poll()
    os._exit(LOST_PARENT)


def _watch(descriptor: int, silence_seconds: float, began_at: float) -> None:
    """Exit this process when the worker has sent no heartbeat for `silence_seconds`, the length of a lease.

    The time at which a heartbeat began counts, not the time at which it is read. After a suspension the pipe holds
    old heartbeats. This thread may also run late although the worker lives, for example while another thread holds
    the GIL. Both processes read the machine's clock. Too long a gap between two heartbeats also exits the process,
    because the lease expired during the gap.
    """
    while True:
        select.select([descriptor], [], [], max(0.0, began_at + silence_seconds - boot_seconds()))
        now = boot_seconds()  # before the pipe is read, so that no heartbeat that arrived by then is missed
        readable, _, _ = select.select([descriptor], [], [], 0)
        signs = os.read(descriptor, PIPE_BYTES) if readable else None
        if signs == b"":
            os._exit(LOST_PARENT)
        for (sign,) in SIGN.iter_unpack(signs or b""):
            if sign - began_at > silence_seconds:
                os._exit(LOST_PARENT)
            began_at = sign
        if now - began_at > silence_seconds:
            os._exit(LOST_PARENT)


def main(arguments: Sequence[str]) -> None:
    """Become `arguments[2:]` in the sandbox `arguments[1]`, unless the parent with the process id `arguments[0]` has
    already died. Exits with REFUSED if the sandbox can't be applied."""
    parent, sandbox, *argv = arguments
    die_with_parent(int(parent))
    try:
        apply(Sandbox.from_argument(sandbox))
    except OSError as error:
        sys.stderr.write(f"{REFUSAL}{error}\n")
        sys.exit(REFUSED)
    os.execv(argv[0], argv)  # noqa: S606  (a list of arguments, ours)


if __name__ == "__main__":
    main(sys.argv[1:])
