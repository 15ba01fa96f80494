"""The demo in unusual environments: variables, full and read-only disks, interrupts."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from demo_parts import service, surroundings  # noqa: E402  # pyright: ignore[reportMissingImports]
from demo_parts.report import DemoFailed  # noqa: E402  # pyright: ignore[reportMissingImports]

INTERRUPTS = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"


@pytest.fixture
def environment() -> Iterator[pytest.MonkeyPatch]:
    """Removes Lorry's settings, and restores the environment, which `remove_lorry_settings` changes."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in [name for name in os.environ if name.startswith("LORRY_")]:
            monkeypatch.delenv(name)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "")
        yield monkeypatch


def test_lorry_settings_are_removed_and_listed(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment.setenv("LORRY_URL", "http://elsewhere.example")
    environment.setenv("LORRY_DATABASE_URL", "postgresql://elsewhere.example/x")
    environment.setenv("LORRY_DEMO_DIR", "/kept")
    environment.setenv("NO_PROXY", "corp.example")

    removed = surroundings.remove_lorry_settings()

    assert removed == ["LORRY_DATABASE_URL", "LORRY_URL"]

    printed = " ".join(capsys.readouterr().out.split())
    assert "LORRY_DATABASE_URL, LORRY_URL." in printed
    assert not {"LORRY_URL", "LORRY_DATABASE_URL"} & os.environ.keys()
    assert os.environ["LORRY_DEMO_DIR"] == "/kept"
    assert os.environ["NO_PROXY"] == "corp.example,127.0.0.1,localhost"


@pytest.mark.usefixtures("environment")
def test_without_lorry_settings_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    surroundings.remove_lorry_settings()

    assert capsys.readouterr().out == ""


def test_a_second_demo_in_the_folder_fails_until_the_first_has_finished(tmp_path: Path) -> None:
    with (
        surroundings.locked(tmp_path),
        pytest.raises(DemoFailed, match=rf"process {os.getpid()}.*LORRY_DEMO_DIR"),
        surroundings.locked(tmp_path),
    ):
        pass

    with surroundings.locked(tmp_path):
        assert (tmp_path / "demo.lock").read_text() == f"{os.getpid()}\n"


def test_a_full_disk_fails_before_any_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_DEMO_DIR", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=500_000_000))

    with pytest.raises(DemoFailed, match=r"0\.5 GB free; the demo needs 1\.0 GB.*LORRY_DEMO_DIR"):
        surroundings.folder()

    (tmp_path / "data/bases/x").mkdir(parents=True)
    (tmp_path / "data/bases/x/model.safetensors").touch()
    assert surroundings.folder() == tmp_path


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "Free some space on that disk, or use"), (errno.EROFS, "Make the folder writable, or use")],
)
def test_an_unwritable_folder_fails_with_a_fix(number: int, remedy: str) -> None:
    message = surroundings.explained(OSError(number, os.strerror(number), "/x"))

    assert message.startswith(f"/x: {os.strerror(number)}. {remedy}")


def test_an_interrupt_while_the_demo_loads_ends_it_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "openai.py").write_text(INTERRUPTS)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py")], capture_output=True, text=True, env=environment, check=False
    )

    assert (done.returncode, done.stderr) == (130, "")
    assert done.stdout.count("\n") == 1


def test_a_second_interrupt_stops_the_service_immediately() -> None:
    calls: list[str] = []

    def wait(_seconds: float | None = None) -> None:
        calls.append("wait")
        if calls.count("wait") == 1:
            raise KeyboardInterrupt

    service._stop(SimpleNamespace(terminate=lambda: calls.append("terminate"), wait=wait))

    assert calls == ["terminate", "wait", "terminate", "wait"]
