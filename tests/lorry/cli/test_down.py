"""`lorry down` stops the process that holds the data folder, and no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import Result

from lorry.cli.commands import down
from lorry.local import lock

Run = Callable[..., Result]
HOLDS = r"""
import os, signal, sys, time
from pathlib import Path
from lorry.local.lock import DataLock

received = []

def receive(*_):
    received.append(1)
    os.write(1, b"received\n")

signal.signal(signal.SIGTERM, receive)
with DataLock(Path(sys.argv[1])):
    print("held", flush=True)
    while len(received) < int(sys.argv[2]):
        time.sleep(0.01)
"""
"""A program that locks the data folder and exits after a number of signals, as `lorry up` does after one or two."""


@contextmanager
def holding(folder: Path, *, num_signals: int = 1) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", HOLDS, str(folder), str(num_signals)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_down_stops_the_process_that_locks_the_folder(run: Run, tmp_path: Path) -> None:
    with holding(tmp_path) as process:
        result = run("down", "--data-dir", tmp_path)

        assert result.exit_code == 0
        assert process.wait(60) == 0
    assert f"(process {process.pid})" in result.stderr
    assert result.stderr.endswith("Stopped.\n")


def test_down_without_a_service_stops_nothing(run: Run, tmp_path: Path) -> None:
    result, machine = run("down", "--data-dir", tmp_path), run("down", "--data-dir", tmp_path, "--json")

    assert (result.exit_code, result.stderr) == (0, f"No service is running in {tmp_path}.\n")
    assert json.loads(machine.stdout) == {"data_dir": str(tmp_path), "stopped_pid": None}


def test_down_ignores_a_stale_process_id(run: Run, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        (tmp_path / lock.FILE_NAME).write_text(f"{other.pid}\n")

        assert lock.holder(tmp_path) is None
        assert "No service is running" in run("down", "--data-dir", tmp_path).stderr
        assert other.poll() is None
        other.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="Only /proc shows the open files of a process.")
def test_process_without_the_open_lock_file_is_not_the_holder(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        with holding(tmp_path) as process:
            assert lock.holder(tmp_path) == process.pid
            (tmp_path / lock.FILE_NAME).write_text(f"{other.pid}\n")  # as between two writes of a starting service
            assert lock.holder(tmp_path) is None
            (tmp_path / lock.FILE_NAME).write_text("no id\n")
            assert lock.holder(tmp_path) is None
        other.kill()


def test_second_down_stops_a_slow_service_immediately(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with holding(tmp_path, num_signals=2) as process:
        with monkeypatch.context() as patched:
            patched.setattr(down, "PATIENCE_SECONDS", 0.0)
            first = run("down", "--data-dir", tmp_path)
        assert process.stdout is not None
        assert process.stdout.readline() == "received\n"  # two pending signals of one kind count as one
        second = run("down", "--data-dir", tmp_path)

        assert (first.exit_code, second.exit_code) == (1, 0)
        assert "Run `lorry down` again" in first.stderr
        assert process.wait(60) == 0


def test_data_folder_defaults_to_the_environment_variable(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LORRY_DATA_DIR", str(tmp_path))

    with holding(tmp_path) as process:
        assert json.loads(run("down", "--json").stdout)["stopped_pid"] == process.pid
    assert process.pid != os.getpid()
