"""The child process of a background task: its result, its failures, and what ends it early."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from catalog.error_texts import ErrorText
from catalog.errors import LorryError, OutOfSpace, Unavailable
from catalog.settings import Settings
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskClaim, TaskKind
from tests.worker_site import wait_until
from worker.background import child_task
from worker.background.child_task import AttemptFailed, WorkRefused
from worker.node import devices
from worker.process.sandbox import Sandbox
from worker.protocol.errors import EXIT_DISK_FULL

BOX = Sandbox(kind="tokenization", limits={"cpu": 1000})
ANSWERS = """
import json, sys
request = json.load(open(sys.argv[1]))
json.dump({"twice": 2 * request["number"]}, open(request["result"], "w"))
"""
ABOUT = {"action": "The work", "worker_id": "w1"}
Run = Callable[[str], Any]


@pytest.fixture
def context(tmp_path: Path) -> Any:
    """Return the part of a worker's context that worker/background/child_task.py uses."""
    settings = Settings(data_dir=tmp_path, heartbeat_seconds=1e-6)
    return SimpleNamespace(settings=settings, db=None, draining=False, worker_id="w1")


@pytest.fixture
def run(context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return run(program), which runs the program as the child of a task and returns its result."""

    def run(program: str) -> Any:
        def run_child(_module: str, arguments: str, *, log_path: Path, box: Sandbox) -> subprocess.Popen[bytes]:
            assert box is BOX
            with log_path.open("ab") as log:
                argv = [sys.executable, "-c", program, arguments]
                return subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)

        monkeypatch.setattr(child_task, "run_child", run_child)
        return child_task.run(
            context, "a.module", {"number": 21}, work=tmp_path, box=BOX, action="The work", crash="export_crashed"
        )

    return run


def test_a_child_gets_the_request_and_returns_its_result(run: Run) -> None:
    assert run(ANSWERS) == {"twice": 42}


def test_a_failure_has_the_exit_status_and_the_last_line_of_output(run: Run) -> None:
    with pytest.raises(AttemptFailed) as caught:
        run("import sys; print('First.'); print('KeyError: 1.'); print(); sys.exit(3)")

    assert caught.value.text == ErrorText.of(
        "export_crashed",
        action="The work",
        worker_id="w1",
        exited="failed with exit status 3",
        last_line="KeyError: 1",
    )


def test_killed_child_points_at_the_memory(run: Run) -> None:
    with pytest.raises(AttemptFailed) as caught:
        run("import os; os.kill(os.getpid(), 9)")

    assert caught.value.code == "out_of_memory"
    assert caught.value.message == (
        "The work on worker w1 was killed by signal 9 (SIGKILL), probably because the machine ran out of memory."
    )


def test_child_that_exceeds_its_processor_time_is_refused_on_every_worker(run: Run) -> None:
    with pytest.raises(WorkRefused, match=f"used {BOX.limits['cpu']:,} s of processor time, the limit"):
        run("import os, signal; os.kill(os.getpid(), signal.SIGXCPU)")


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("out_of_space", OutOfSpace, "The disk on worker w1 is full."),
        ("disk_error", AttemptFailed, "It failed (worker w1)."),
        ("unsupported_model", WorkRefused, "It failed."),
    ],
)
def test_reported_error_is_of_this_worker_or_of_every_worker(
    run: Run, code: str, error: type[LorryError], message: str
) -> None:
    reported = {"code": code, "message": "It failed.", "remedy": "Fix it."}

    with pytest.raises(error) as caught:
        run(ANSWERS.replace('{"twice": 2 * request["number"]}', repr({"error": reported})))

    assert (type(caught.value), caught.value.message) == (error, message)


def test_a_long_last_line_is_cut(run: Run) -> None:
    with pytest.raises(AttemptFailed) as caught:
        run(f"print('x' * {child_task.LINE_CHARS + 1})")

    assert caught.value.message.endswith(f": {'x' * child_task.LINE_CHARS}.")


def test_a_failure_is_not_attributed_to_the_output_of_an_earlier_child(run: Run) -> None:
    run(ANSWERS + "print('OSError: [Errno 28] No space left on device')")

    with pytest.raises(AttemptFailed, match="no output"):
        run("raise SystemExit(3)")


@pytest.mark.parametrize(
    ("program", "is_full"),
    [
        ("raise OSError(28, 'No space left on device')", False),
        (f"raise SystemExit({EXIT_DISK_FULL})", False),
        ("raise SystemExit(1)", True),
    ],
    ids=["in the log", "as exit status", "not at all"],
)
def test_a_full_disk_is_recognized_however_the_child_reports_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, program: str, is_full: bool
) -> None:
    monkeypatch.setattr(devices, "is_disk_full", lambda _folder: is_full)

    with pytest.raises(OutOfSpace):
        run(program)


def test_a_child_without_progress_is_terminated(
    context: Any, monkeypatch: pytest.MonkeyPatch, sleeper: subprocess.Popen[bytes]
) -> None:
    monkeypatch.setattr(child_task, "STALL_SECONDS", 0.0)
    monkeypatch.setattr(child_task._Progress, "_seconds_used", lambda _self: 0.0)  # pyright: ignore[reportPrivateUsage]

    with pytest.raises(
        AttemptFailed, match="The work on worker w1 was stopped because it used no processor time for 0 s"
    ):
        child_task.wait_for_child(sleeper, context, lambda: False, about=ABOUT)

    assert sleeper.returncode is not None


def test_progress_of_a_process_that_the_child_has_started_counts() -> None:
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    child = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    seconds_used = child_task._Progress(child.pid, ABOUT)._seconds_used  # pyright: ignore[reportPrivateUsage]

    try:
        own = psutil.Process(child.pid)
        wait_until(lambda: seconds_used() > 0.2 + sum(own.cpu_times()[:2]))
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def test_no_child_is_left_running_after_an_unexpected_error(context: Any, sleeper: subprocess.Popen[bytes]) -> None:
    def fail() -> bool:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        child_task.wait_for_child(sleeper, context, fail, about=ABOUT)

    assert sleeper.returncode is not None


def test_a_database_outage_does_not_stop_a_child(
    context: Any, monkeypatch: pytest.MonkeyPatch, sleeper: subprocess.Popen[bytes]
) -> None:
    was_called = threading.Event()

    def renew(*_arguments: Any, **_options: Any) -> bool:
        if was_called.is_set():
            sleeper.kill()  # the second call: the child has finished
        was_called.set()
        raise Unavailable(ErrorText(code="unavailable", message="It does not answer.", remedy="Wait."))

    monkeypatch.setattr(task_queue, "renew", renew)

    is_unwanted = child_task.lost_lease(
        context, TaskClaim(claim_id="task-1", kind=TaskKind.PLAN, subject="p", num_attempts=1)
    )
    child_task.wait_for_child(sleeper, context, is_unwanted, about=ABOUT)

    assert was_called.is_set()
