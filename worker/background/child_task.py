"""Runs the child process of a background task: passes its request, waits for it, and returns its result or failure."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil

from catalog.disk import tells_of_full
from catalog.errors import LorryError, Unavailable
from catalog.tables.table import Json
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskClaim
from worker.context.context import WorkerContext
from worker.node import devices
from worker.process.launcher import run_child
from worker.process.sandbox import Sandbox
from worker.protocol.errors import EXIT_DISK_FULL
from worker.protocol.mailbox import read_json, write_json

log = logging.getLogger(__name__)
POLL_SECONDS = 0.2
STALL_SECONDS = 900.0
"""A child that has used no processor time for this long is stuck."""
LIMIT_SECONDS = 12 * 3600.0
"""Time limit of a child."""
LINE_CHARS = 500
"""Characters of the log's last line that an error message shows."""


class Abandoned(Exception):
    """The worker is shutting down, or the result is no longer needed. Another worker may do the work."""


class ChildFailed(Exception):
    """A child exited without a result."""

    def __init__(self, returncode: int, last_line: str, *, is_disk_full: bool) -> None:
        """last_line: of its log, without the final period. is_disk_full: the worker's disk is the cause, so the error
        must not name the child's input as the cause."""
        super().__init__(f"exit status {returncode}: {last_line}")
        self.returncode = returncode
        self.last_line = last_line
        self.is_disk_full = is_disk_full


def run(
    context: WorkerContext,
    module: str,
    request: Json,
    *,
    work: Path,
    box: Sandbox,
    stuck: Callable[[str], LorryError],
    is_unwanted: Callable[[], bool] = lambda: False,
) -> Json:
    """Run `python -m module ARGUMENTS.json` in its sandbox until it exits, and return its result.

    The arguments are `request` and the path of the result file, which the child writes atomically at its end. They and
    the child's output are files in the folder `work`. stuck, is_unwanted: see `wait_for_child`. Raises ChildFailed,
    and the errors of `wait_for_child`.
    """
    arguments, result, log_path = (work / name for name in ("arguments.json", "result.json", "log.txt"))
    for of_previous_child in (result, log_path):
        of_previous_child.unlink(missing_ok=True)
    write_json(arguments, {**request, "result": str(result)})
    child = run_child(module, str(arguments), log_path=log_path, box=box)
    wait_for_child(child, context, is_unwanted, stuck=stuck)
    if not result.exists():
        raise _failure(child.returncode, work, log_path)
    return read_json(result)


def _failure(returncode: int, work: Path, log_path: Path) -> ChildFailed:
    """Return the error of a child without a result. If the disk is full, the child may not have been able to write its
    log either."""
    lines = [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    is_reported = returncode == EXIT_DISK_FULL or (bool(lines) and tells_of_full(lines[-1]))
    last_line = lines[-1][:LINE_CHARS].rstrip(".") if lines else "no output"
    return ChildFailed(returncode, last_line, is_disk_full=is_reported or devices.is_disk_full(work))


def lost_lease(context: WorkerContext, task: TaskClaim) -> Callable[[], bool]:
    """Return a function that returns whether the lease of a task is lost. Called several times a second, it renews the
    lease at each heartbeat interval."""
    renew = partial(task_queue.renew, context.db, task, lease_seconds=context.settings.lease_seconds)
    return at_each_heartbeat(context, lambda: not renew())


def at_each_heartbeat(context: WorkerContext, check: Callable[[], bool]) -> Callable[[], bool]:
    """Return a function that calls `check` once per heartbeat interval, and returns False in between.

    A short outage of the database does not discard the work, because its result is valid whichever worker computes it.
    """
    checked_at = time.monotonic()

    def check_when_due() -> bool:
        nonlocal checked_at
        if time.monotonic() - checked_at < context.settings.heartbeat_seconds:
            return False
        checked_at = time.monotonic()
        try:
            return check()
        except Unavailable as error:
            log.warning("%s The background work continues.", error)
            return False

    return check_when_due


def wait_for_child(
    child: subprocess.Popen[bytes],
    context: WorkerContext,
    is_unwanted: Callable[[], bool] = lambda: False,
    *,
    stuck: Callable[[str], LorryError],
) -> None:
    """Wait until the child exits. On any exception, it is killed. `is_unwanted` is called several times a second.

    Raises Abandoned if the worker shuts down or the result is unwanted, and the error of `stuck` if the child makes no
    progress.
    """
    progress = _Progress(child.pid, stuck)
    try:
        while True:
            try:
                child.wait(POLL_SECONDS)
                return
            except subprocess.TimeoutExpired:
                pass
            if context.draining or is_unwanted():
                raise Abandoned
            progress.check()
    finally:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


class _Progress:
    """Checks the progress of a child. A child that loads, converts or downloads uses processor time."""

    def __init__(self, pid: int, stuck: Callable[[str], LorryError]) -> None:
        self._pid = pid
        self._stuck = stuck
        self._started_at = self._moved_at = time.monotonic()
        self._seconds = 0.0

    def check(self) -> None:
        """Raise the error of `stuck` once the child has been inactive for too long, or has run for too long."""
        now, seconds = time.monotonic(), self._seconds_used()
        if seconds > self._seconds:
            self._seconds, self._moved_at = seconds, now
        if now - self._moved_at > STALL_SECONDS:
            raise self._stuck(f"it used no processor time for {now - self._moved_at:,.0f} s")
        if now - self._started_at > LIMIT_SECONDS:
            raise self._stuck(f"it did not finish within {LIMIT_SECONDS / 3600:.0f} hours, the maximum")

    def _seconds_used(self) -> float:
        """Return the processor time of the child and of the processes that it has started and may have ended."""
        try:
            child = psutil.Process(self._pid)
            return sum(sum(each.cpu_times()[:4]) for each in (child, *child.children(recursive=True)))
        except psutil.Error:
            return self._seconds
