"""Runs the child process of a background task: passes its request, waits for it, and returns its result or failure."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil

from catalog.disk import tells_of_full
from catalog.error_texts import ErrorText
from catalog.errors import LorryError, OutOfSpace, Unavailable
from catalog.processes import how_it_exited, is_killed
from catalog.tables.table import Json
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskClaim
from worker.context.context import WorkerContext
from worker.node import devices
from worker.process.launcher import run_child
from worker.process.sandbox import Sandbox
from worker.protocol.errors import DISK_ERROR, EXIT_DISK_FULL, OUT_OF_SPACE
from worker.protocol.mailbox import read_json, write_json

log = logging.getLogger(__name__)
POLL_SECONDS = 0.2
STALL_SECONDS = 900.0
"""A child that has used no processor time for this long is stuck."""
LIMIT_SECONDS = 12 * 3600.0
"""Time limit of a child."""
LINE_CHARS = 500
"""Characters of the log's last line that an error message shows."""
CODES_OF_MACHINES = frozenset({DISK_ERROR, "export_failed", "hub_unreachable"})
"""Codes of errors that a child reports and that another machine may not have."""


class Abandoned(Exception):
    """The worker is shutting down, or the result is no longer needed. Another worker may do the work."""


class AttemptFailed(LorryError):
    """The work failed, perhaps because of this worker."""


class WorkRefused(LorryError):
    """The work fails on every worker."""


def run(
    context: WorkerContext,
    module: str,
    request: Json,
    *,
    work: Path,
    box: Sandbox,
    action: str,
    crash: str,
    is_unwanted: Callable[[], bool] = lambda: False,
    **values: str,
) -> Json:
    """Run `python -m module ARGUMENTS.json` in its sandbox until it exits, and return its result.

    The arguments are `request` and the path of the result file, which the child writes atomically at its end. They and
    the child's output are files in the folder `work`.

    action: what the child does, as the beginning of an error message. crash: name of the error text for a child that
    exits without a result, with `values` for its placeholders. is_unwanted: called several times a second.

    Raises Abandoned if the worker shuts down or the result is unwanted, OutOfSpace, WorkRefused with the error that the
    child reports, and AttemptFailed if the child crashes, makes no progress, or reports an error of its machine.
    """
    arguments, result, log_path = (work / name for name in ("arguments.json", "result.json", "log.txt"))
    for of_previous_child in (result, log_path):
        of_previous_child.unlink(missing_ok=True)
    write_json(arguments, {**request, "result": str(result)})
    child = run_child(module, str(arguments), log_path=log_path, box=box)
    about = {"action": action, "worker_id": context.worker_id}
    wait_for_child(child, context, is_unwanted, about=about)
    if result.exists():
        answer = read_json(result)
        if "error" in answer:
            raise _reported_error(ErrorText(**answer["error"]), context.worker_id)
        return answer
    lines = [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    # If the disk is full, the child may not have been able to write its log either.
    is_reported = child.returncode == EXIT_DISK_FULL or (bool(lines) and tells_of_full(lines[-1]))
    if is_reported or devices.is_disk_full(work):
        raise OutOfSpace("disk_full_on_worker", worker_id=context.worker_id)
    values |= {**about, "last_line": lines[-1][:LINE_CHARS].rstrip(".") if lines else "no output"}
    if child.returncode == -signal.SIGXCPU and "cpu" in box.limits:
        raise WorkRefused(crash, exited=f"used {box.limits['cpu']:,} s of processor time, the limit", **values)
    exited = how_it_exited(child.returncode)
    if is_killed(child.returncode):
        raise AttemptFailed("child_killed", **about, exited=exited)
    raise AttemptFailed(crash, exited=exited, **values)


def _reported_error(text: ErrorText, worker_id: str) -> LorryError:
    if text.code == OUT_OF_SPACE:
        return OutOfSpace("disk_full_on_worker", worker_id=worker_id)
    if text.code not in CODES_OF_MACHINES:
        return WorkRefused(text)
    return AttemptFailed(replace(text, message=f"{text.message.removesuffix('.')} (worker {worker_id})."))


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
    is_unwanted: Callable[[], bool],
    *,
    about: Mapping[str, str],
) -> None:
    """Wait until the child exits. On any exception, it is killed. `is_unwanted` is called several times a second.

    Raises Abandoned if the worker shuts down or the result is unwanted, and AttemptFailed with the values `about` if
    the child makes no progress.
    """
    progress = _Progress(child.pid, about)
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

    def __init__(self, pid: int, about: Mapping[str, str]) -> None:
        self._pid = pid
        self._about = about
        self._started_at = self._moved_at = time.monotonic()
        self._seconds = 0.0

    def check(self) -> None:
        """Raises AttemptFailed once the child has been inactive for too long, or has run for too long."""
        now, seconds = time.monotonic(), self._seconds_used()
        if seconds > self._seconds:
            self._seconds, self._moved_at = seconds, now
        if now - self._moved_at > STALL_SECONDS:
            why = f"it used no processor time for {now - self._moved_at:,.0f} s"
        elif now - self._started_at > LIMIT_SECONDS:
            why = f"it did not finish within {LIMIT_SECONDS / 3600:.0f} hours, the maximum"
        else:
            return
        raise AttemptFailed("child_no_progress", **self._about, why=why)

    def _seconds_used(self) -> float:
        """Return the processor time of the child and of the processes that it has started and may have ended."""
        try:
            child = psutil.Process(self._pid)
            return sum(sum(each.cpu_times()[:4]) for each in (child, *child.children(recursive=True)))
        except psutil.Error:
            return self._seconds
