"""Dataset checks run in a separate process, give the same result, and never outlive their caller."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from catalog.datasets import check_process, validator
from catalog.datasets.check_process import CheckStopped
from catalog.datasets.validator import DatasetCheck
from catalog.errors import InvalidRequest, Unavailable

ROOT = Path(__file__).parents[3]
MAX_LINE_BYTES, MAX_ROWS = 1000, 100
CHAT = json.dumps({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]})
STUCK = (sys.executable, "-c", "import os; os.read(0, 1)")


def in_a_process(path: Path, is_abandoned: Callable[[], bool] = lambda: False) -> DatasetCheck:
    return check_process.inspect(path, max_line_bytes=MAX_LINE_BYTES, max_rows=MAX_ROWS, is_abandoned=is_abandoned)


def here(path: Path) -> DatasetCheck:
    with path.open("rb") as lines:
        return validator.inspect(lines, max_line_bytes=MAX_LINE_BYTES, max_rows=MAX_ROWS)


def written(folder: Path, text: str) -> Path:
    path = folder / "data.jsonl"
    path.write_text(text)
    return path


def test_process_finds_the_same_result_as_an_in_process_check(tmp_path: Path) -> None:
    path = written(tmp_path, f"{CHAT}\n" * 3)

    assert in_a_process(path) == here(path)


@pytest.mark.parametrize("text", ["", "nonsense\n", f'{CHAT}\n{{"a": 1}}\n', f"{CHAT}\n" * 101, "[" * 999])
def test_process_rejects_with_the_same_message(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)

    with pytest.raises(InvalidRequest) as own:
        here(path)
    with pytest.raises(InvalidRequest) as other:
        in_a_process(path)

    expected, found = own.value, other.value
    assert (found.message, found.code, found.remedy, found.param) == (
        expected.message,
        expected.code,
        expected.remedy,
        expected.param,
    )


@pytest.mark.parametrize(
    ("code", "reason", "remedy"),
    [
        ("raise SystemExit(7)", "exit status 7", ""),
        ("import os; os.kill(os.getpid(), 9)", r"was killed by signal 9 \(SIGKILL\)", "memory"),
    ],
)
def test_failed_process_is_reported_with_its_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str, remedy: str
) -> None:
    monkeypatch.setattr(check_process, "COMMAND", (sys.executable, "-c", code))

    with pytest.raises(Unavailable, match=reason) as failed:
        in_a_process(written(tmp_path, CHAT))

    assert failed.value.code == "preparation_failed"
    assert remedy in failed.value.remedy


def test_process_inherits_no_secrets_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_PEPPER", "a secret")
    counts = "import json, os; print(json.dumps({'num_rows': sum(name.startswith('LORRY_') for name in os.environ)}))"
    monkeypatch.setattr(check_process, "COMMAND", (sys.executable, "-c", counts))

    assert in_a_process(written(tmp_path, CHAT)).num_rows == 0


def test_abandoned_check_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_process, "COMMAND", STUCK)
    others = set(psutil.Process().children())  # such as the servers of other tests
    seen: set[psutil.Process] = set()

    def is_abandoned() -> bool:
        seen.update(set(psutil.Process().children()) - others)
        return True

    with pytest.raises(CheckStopped):
        in_a_process(written(tmp_path, CHAT), is_abandoned)

    assert seen
    assert not any(each.is_running() for each in seen)


@pytest.mark.skipif(sys.platform == "win32", reason="needs named pipes")
def test_check_exits_when_its_parent_process_is_killed(tmp_path: Path) -> None:
    pipe = tmp_path / "data.jsonl"
    os.mkfifo(pipe)  # the check blocks until a writer opens the pipe
    begin = (
        f"from pathlib import Path; from catalog.datasets import check_process as c; c.inspect(Path({str(pipe)!r}), "
    )
    parent = subprocess.Popen([sys.executable, "-c", f"{begin}max_line_bytes=9, max_rows=9)"], cwd=ROOT)
    writer = os.open(pipe, os.O_WRONLY)  # returns once the check has opened the pipe
    children = psutil.Process(parent.pid).children()

    parent.send_signal(signal.SIGKILL)
    parent.wait()

    assert len(children) == 1
    _, left = psutil.wait_procs(children, timeout=30)
    os.close(writer)
    assert not left
