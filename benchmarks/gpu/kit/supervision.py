"""A parent process without torch. If a stage ends or blocks its process, another process runs the remaining stages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu.kit.log import Log

PROGRESS = "LORRY_KIT_PROGRESS"
"""Environment variable with the path of the progress, in a process that runs stages."""
GRACE_SECONDS = 20
"""Time after a stage's deadline until its process ends, if a call to the device does not return."""
LEAST_SECONDS = 2


@dataclass(kw_only=True)
class Progress:
    """The state that a process of the kit leaves to the next one, in a file that the parent reads.

    Attributes:
        started, ends: Start and time limit of the run, in seconds of the monotonic clock, which all processes share.
        names: Stages of the next process. None until a process has accepted the options.
        stage: The stage that runs now, or "".
        until: Its deadline, or without a stage that of the process.
        suspect: The family of kernels that runs now, or "".
        left_out: Families of kernels that the next process does without.
        matrix_flops: See `Kit`.
    """

    path: Path | None = None
    started: float = 0.0
    ends: float = 0.0
    names: list[str] | None = None
    stage: str = ""
    until: float = 0.0
    suspect: str = ""
    left_out: list[str] = field(default_factory=list[str])
    matrix_flops: float | None = None

    @classmethod
    def read(cls, path: Path) -> Progress:
        return cls(path=path, **json.loads(path.read_text()))

    def write(self) -> None:
        if self.path is not None:
            draft = self.path.with_suffix(".new")
            draft.write_text(json.dumps({name: value for name, value in asdict(self).items() if name != "path"}))
            draft.replace(self.path)

    def leave_out_suspect(self) -> None:
        """Let the next process do without the kernels that run now."""
        self.left_out = sorted({*self.left_out, self.suspect} - {""})
        self.suspect = ""

    @property
    def killed_at(self) -> float:
        """Time at which the parent kills the process. A process that a stage blocks tries to end itself before."""
        return self.until + (1.25 * GRACE_SECONDS if self.stage else LEAST_SECONDS)

    @property
    def stack(self) -> Path | None:
        """The file for the stack of a process that a stage blocks."""
        return None if self.path is None else self.path.with_suffix(".stack")


def supervise(command: Sequence[str], folder: Path, *, started: float, seconds: float) -> int:
    """Run `command`, again while stages and time remain. Returns its status, or 1, if it ends before a stage."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the process ends, too
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "progress.json"
        progress = Progress(path=path, started=started, ends=started + seconds, until=started + seconds)
        while True:
            progress.write()
            before = progress.names, progress.left_out
            status = _run(command, path)
            progress = Progress.read(path)
            if progress.stage:
                _record_end(progress, folder, status)
            has_time = progress.ends - time.monotonic() > LEAST_SECONDS
            if progress.names is not None and not (progress.names and has_time):
                return 0
            if progress.names is None or (progress.names, progress.left_out) == before:
                return status if status is not None and status > 0 else 1


def _run(command: Sequence[str], path: Path) -> int | None:
    """Run a process until it ends, or kill it when it is late. Returns its status, or None if it still does not end."""
    process = subprocess.Popen(command, env=os.environ | {PROGRESS: str(path)})
    try:
        while process.poll() is None and time.monotonic() < Progress.read(path).killed_at:
            time.sleep(0.1)
    finally:
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # a process that waits for the device may not end
            process.wait(timeout=GRACE_SECONDS / 4)
    return process.returncode


def _record_end(progress: Progress, folder: Path, status: int | None) -> None:
    """Record that a stage ended its process or blocked it, and prepare the next process."""
    is_late = time.monotonic() > progress.until + GRACE_SECONDS / 2
    value = "blocked its process" if is_late else f"ended its process with status {status}"
    stack = ""
    if progress.stack is not None and progress.stack.exists():
        stack = progress.stack.read_text()
        progress.stack.unlink()
    place = stack.rpartition("(most recent call first):\n")[2].partition("\n")[0].strip()
    details = {"suspect": progress.suspect, "place": place, "traceback": stack}
    log = Log(folder, started=progress.started)
    log.record(progress.stage, "stage", value, "text", **{key: text for key, text in details.items() if text})
    log.write_page()
    sys.stdout.write(f"{progress.stage}: {value}\n")
    progress.leave_out_suspect()
    progress.stage = ""
    progress.until = progress.ends
