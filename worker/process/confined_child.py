"""A worker's children, and the two ways in which they end with it.

The kernel kills a direct child whose worker dies (`lorry.local.parent_watch`); here such a child is confined as well:
`python -m worker.process.confined_child PARENT SANDBOX ARGV…` applies the sandbox and becomes ARGV. A trainer holds a
lease besides: the read end of a pipe is its standard input, the only descriptor that launchers hand on. It exits when
that closes, or when the worker sends no sign of life for too long.
"""

from __future__ import annotations

import os
import select
import struct
import sys
import threading
from collections.abc import Sequence

from lorry.local.parent_watch import LOST_PARENT, die_with_parent
from worker.process.clock import boot_seconds
from worker.process.sandbox import REFUSAL, REFUSED, Sandbox, apply

OPTION = "--tethered="
SIGN = struct.Struct("=d")
"""A sign of life: the `boot_seconds` at which the parent sent it. A pipe takes one whole or not at all."""
PIPE_BYTES = 2**16


def confined(argv: Sequence[str], sandbox: Sandbox) -> list[str]:
    """`argv` as a command that the kernel kills when the calling thread ends, and confines to the sandbox."""
    return [sys.executable, "-m", "worker.process.confined_child", str(os.getpid()), sandbox.as_argument(), *argv]


def hold_on(argv: Sequence[str]) -> None:
    """Tie this process to its parent if `argv` says `--tethered=SECONDS`: end after so long without a sign.

    Of several processes that one launcher has started the first reads the pipe, for a sign goes to one reader; the
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


def watch_pipe(descriptor: int, *, silence_seconds: float) -> threading.Thread:
    """Start the thread that ends this process when the pipe closes, or brings no sign of life for so long."""
    since = descriptor, silence_seconds, boot_seconds()
    thread = threading.Thread(target=_watch, args=since, name="tether", daemon=True)
    thread.start()
    return thread


def watch_end(descriptor: int) -> threading.Thread:
    """Start the thread that ends this process when the pipe closes; it reads nothing."""
    thread = threading.Thread(target=_watch_end, args=(descriptor,), name="tether", daemon=True)
    thread.start()
    return thread


def _watch_end(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, 0)  # of itself it tells when the other end has gone
    poll.poll()
    os._exit(LOST_PARENT)


def _watch(descriptor: int, silence_seconds: float, sent_at: float) -> None:
    """End this process when the worker has shown no sign of life for `silence_seconds`, a lease.

    What counts is when the signs were sent, not when they are read: after a suspension the pipe holds old ones, and
    this thread may run late although its worker lives, for instance while another holds the GIL. Both processes read
    the machine's clock. A gap between two signs ends the process too, for the lease has ended in it.
    """
    while True:
        select.select([descriptor], [], [], max(0.0, sent_at + silence_seconds - boot_seconds()))
        now = boot_seconds()  # before the pipe is read, so that no sign that came by then is missed
        readable, _, _ = select.select([descriptor], [], [], 0)
        signs = os.read(descriptor, PIPE_BYTES) if readable else None
        if signs == b"":
            os._exit(LOST_PARENT)
        for (sign,) in SIGN.iter_unpack(signs or b""):
            if sign - sent_at > silence_seconds:
                os._exit(LOST_PARENT)
            sent_at = sign
        if now - sent_at > silence_seconds:
            os._exit(LOST_PARENT)


def main(arguments: Sequence[str]) -> None:
    """Become `arguments[2:]` in the sandbox `arguments[1]`, unless the parent, whose process id is `arguments[0]`, has
    died already. Exits with REFUSED if the sandbox can't be applied."""
    parent, sandbox, *argv = arguments
    die_with_parent(int(parent))
    try:
        apply(Sandbox.of_argument(sandbox))
    except OSError as error:
        sys.stderr.write(f"{REFUSAL}{error}\n")
        sys.exit(REFUSED)
    os.execv(argv[0], argv)  # noqa: S606  (a list of arguments, ours)


if __name__ == "__main__":
    main(sys.argv[1:])
