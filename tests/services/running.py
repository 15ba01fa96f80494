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

from tests.services.programs import Missing

START_SECONDS = 60.0
GUARD = Path(__file__).with_name("guard.py")


@contextmanager
def running(argv: list[str], *, log: Path, is_ready: Callable[[], bool], user: str | None = None) -> Iterator[int]:
    """Start `argv` under the guard, wait until `is_ready`, give its process id, and end it after the block."""
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
    """A server that is ended, or killed with all its children, and brought again where it was."""

    def __init__(self, bring: Callable[[], AbstractContextManager[int]]) -> None:
        """bring: runs it for as long as the block, and gives its process id."""
        self._bring = bring
        self._open = ExitStack()
        self._pid: int | None = None

    @property
    def is_running(self) -> bool:
        """As far as was asked for."""
        return self._pid is not None

    def start(self) -> None:
        """Nothing where it runs."""
        if self._pid is None:
            self._pid = self._open.enter_context(self._bring())

    def stop(self) -> None:
        """In good order."""
        self._pid = None
        self._open.close()

    def kill(self) -> None:
        """Every process of it at once, by SIGKILL."""
        assert self._pid is not None, "it does not run"
        server = psutil.Process(self._pid)
        for process in [server, *server.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.stop()


@contextmanager
def server_folder(prefix: str, *, owner: str | None = None) -> Iterator[Path]:
    """A short temporary folder (a unix socket's path is limited to about 100 bytes) that `owner` may write."""
    folder = Path(tempfile.mkdtemp(prefix=f"lorry-{prefix}-"))
    try:
        if owner is not None:
            shutil.chown(folder, owner)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def unprivileged_user() -> str | None:
    """Whom a server that refuses to run as root should run as; None where we are not root."""
    return "nobody" if os.geteuid() == 0 else None


def _wait_until_ready(guard: subprocess.Popen[bytes], is_ready: Callable[[], bool], argv: list[str], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_ready():
        if guard.poll() is not None or time.monotonic() > deadline:
            tail = log.read_text(errors="replace").strip()[-500:]
            raise Missing(f"{argv[0]} did not start: {tail}")
        time.sleep(0.02)
