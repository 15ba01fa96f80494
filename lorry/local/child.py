"""One child process: its command, its log, and the ways to end it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from lorry.local.parent_watch import dying_with_parent

_LONGEST_LOG_BYTES = 16 * 2**20
_TAIL_BYTES = 16 * 2**10


class Child:
    """May be started again after it ended. Ours alone: it is in a session of its own, so Ctrl-C reaches only us."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        log: Path | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """log: None if the child writes where this process does. pass_fds: open descriptors that the child inherits
        under the same numbers."""
        self.name = name
        self.log = log
        self._argv = list(argv)
        self._env = dict(env)
        self._cwd = cwd
        self._pass_fds = tuple(pass_fds)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Call it from the main thread: the child is killed when the thread that started it ends."""
        if self.log is not None:
            keep_short(self.log)
        with contextlib.nullcontext() if self.log is None else self.log.open("ab") as out:
            self._process = subprocess.Popen(
                dying_with_parent(self._argv),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self._env,
                cwd=self._cwd,
                start_new_session=True,
                pass_fds=self._pass_fds,
            )

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def exit_status(self) -> int | None:
        """Negative: the signal that ended it. None: it runs, or never did."""
        return None if self._process is None else self._process.poll()

    def terminate(self) -> None:
        """Ask it to end in its own time."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """Kill it and its process group; `wait` for it afterwards."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def wait(self) -> None:
        """Return when it has ended."""
        if self._process is not None:
            self._process.wait()

    def log_tail(self, num_lines: int = 15) -> str:
        """The last lines that it wrote to its log."""
        if self.log is None:
            return ""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
                return "\n".join(log.read().decode("utf-8", "replace").splitlines()[-num_lines:])
        except OSError:
            return ""


def keep_short(log: Path) -> None:
    """A long log makes room for a new one; one older is kept."""
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > _LONGEST_LOG_BYTES:
            log.replace(log.with_name(f"{log.name}.1"))
