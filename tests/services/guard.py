"""Run one server and end it when the tests end.

However the tests end, the kernel closes the standard input of this process.

Usage: `python guard.py USER|- PROGRAM ARGUMENT…`. Prints the server's process id as its first line.
"""

from __future__ import annotations

import os
import pwd
import select
import signal
import subprocess
import sys

GRACE_SECONDS = 5.0


def main(user: str, argv: list[str]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server = _start(argv, None if user == "-" else user)
    sys.stdout.write(f"{server.pid}\n")
    sys.stdout.flush()
    try:
        _wait_for_end(server)
    finally:
        _end(server)
    return server.returncode


def _start(argv: list[str], user: str | None) -> subprocess.Popen[bytes]:
    if user is None:
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    group = pwd.getpwnam(user).pw_gid
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=sys.stderr, user=user, group=group, extra_groups=[])


def _wait_for_end(server: subprocess.Popen[bytes]) -> None:
    """Wait until the tests are gone (end of file on standard input) or the server has ended."""
    while server.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], 0.2)
        if readable and not os.read(sys.stdin.fileno(), 1):
            return


def _end(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        server.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown; Redis ends too
        try:
            server.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
