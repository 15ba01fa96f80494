"""A server that runs in a temporary folder on a free loopback port for as long as its `with` block."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

START_SECONDS = 120.0
GUARD = Path(__file__).with_name("guard.py")


@contextmanager
def running(argv: list[str], *, log: Path, is_ready: Callable[[], bool], user: str | None = None) -> Iterator[int]:
    """Start `argv` under the guard, wait until `is_ready`, yield its process id, and end it after the block."""
    with (
        log.open("wb") as log_file,
        subprocess.Popen(
            [sys.executable, str(GUARD), user or "-", *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log_file,
            start_new_session=True,
        ) as guard,
    ):
        assert guard.stdin is not None
        assert guard.stdout is not None
        try:
            pid = int(guard.stdout.readline() or b"0")
            _wait_until_ready(guard, is_ready, argv, log)
            yield pid
        finally:
            guard.stdin.close()
            guard.wait()


class Restartable:
    """A server that can be stopped, killed with all its children, and started again in the same place."""

    def __init__(self, bring: Callable[[], AbstractContextManager[int]]) -> None:
        """`bring` runs the server during the block and yields its process id."""
        self._bring = bring
        self._open = ExitStack()
        self._pid: int | None = None

    @property
    def is_running(self) -> bool:
        """True from `start` to `stop`, even if the process has died since."""
        return self._pid is not None

    def start(self) -> None:
        """Start the server unless it is running."""
        if self._pid is None:
            self._pid = self._open.enter_context(self._bring())

    def stop(self) -> None:
        """Stop the server gracefully."""
        self._pid = None
        self._open.close()

    def kill(self) -> None:
        """Send SIGKILL to every process of the server."""
        assert self._pid is not None, "the server is not running"
        server = psutil.Process(self._pid)
        for process in [server, *server.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.stop()


@contextmanager
def server_folder(prefix: str, *, owner: str | None = None) -> Iterator[Path]:
    """Create a short temporary folder that `owner` may write. A unix socket's path is limited to about 100 bytes."""
    folder = Path(tempfile.mkdtemp(prefix=f"lorry-{prefix}-"))
    try:
        if owner is not None:
            shutil.chown(folder, owner)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """Return a loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def closed_port() -> Iterator[int]:
    """Reserve a loopback port on which no process can listen during the block."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield int(taken.getsockname()[1])


def unprivileged_user() -> str | None:
    """Return the user for a server that refuses to run as root, or None if this process is not root."""
    return "nobody" if os.geteuid() == 0 else None


def _wait_until_ready(guard: subprocess.Popen[bytes], is_ready: Callable[[], bool], argv: list[str], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_ready():
        if guard.poll() is not None or time.monotonic() > deadline:
            tail = log.read_text(errors="replace").strip()[-500:]
            raise AssertionError(f"{argv[0]} did not start: {tail}")
        time.sleep(0.02)
