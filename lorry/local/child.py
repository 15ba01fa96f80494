"""A child process: its command, its log, and its termination."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from lorry.local.parent_watch import dying_with_parent, group_dying_with_parent

_LONGEST_LOG_BYTES = 16 * 2**20
_TAIL_BYTES = 16 * 2**10


class Child:
    """A child process in a session of its own, so that Ctrl-C reaches only the parent. It can be restarted."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        log: Path | None = None,
        pass_fds: Sequence[int] = (),
        kills_group: bool = False,
    ) -> None:
        """`log` None: the child inherits stdout and stderr. `pass_fds`: open descriptors that the child inherits under
        the same numbers. `kills_group`: the child's own children, which do not watch it, end with it."""
        self.name = name
        self.log = log
        self._argv = list(argv)
        self._tied = group_dying_with_parent if kills_group else dying_with_parent
        self._env = dict(env)
        self._cwd = cwd
        self._pass_fds = tuple(pass_fds)
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0  # bytes of the log at the last start

    def start(self) -> None:
        """Start the process. Must be called in the main thread: the child is killed when the starting thread ends."""
        if self.log is not None:
            keep_short(self.log)
        with contextlib.nullcontext() if self.log is None else self.log.open("ab") as out:
            self._log_start = out.tell() if out is not None else 0
            self._process = subprocess.Popen(
                self._tied(self._argv),
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
        """Return the exit status; negative for a signal, None if the process runs or was never started."""
        return None if self._process is None else self._process.poll()

    def terminate(self) -> None:
        """Send SIGTERM."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """Kill the process and its process group. Call `wait` afterwards."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def wait(self) -> None:
        """Wait until the process has exited."""
        if self._process is not None:
            self._process.wait()

    def log_tail(self, num_lines: int = 15) -> str:
        """Return the last lines of the log since the last start."""
        if self.log is None:
            return ""
        try:
            with self.log.open("rb") as log:
                log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
                return "\n".join(log.read().decode("utf-8", "replace").splitlines()[-num_lines:])
        except OSError:
            return ""


def keep_short(log: Path) -> None:
    """Rotate a log that is too long. One previous log is kept."""
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > _LONGEST_LOG_BYTES:
            log.replace(log.with_name(f"{log.name}.1"))
