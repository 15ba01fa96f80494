"""What a person's shell and disk may do to the demo."""

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
    """Without settings of Lorry, and restored after the test: `leave_settings_aside` changes the process's own."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in [name for name in os.environ if name.startswith("LORRY_")]:
            monkeypatch.delenv(name)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "")
        yield monkeypatch


def test_another_services_settings_are_left_aside_and_named(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment.setenv("LORRY_URL", "http://elsewhere.example")
    environment.setenv("LORRY_DATABASE_URL", "postgresql://elsewhere.example/x")
    environment.setenv("LORRY_DEMO_DIR", "/kept")
    environment.setenv("NO_PROXY", "corp.example")

    surroundings.leave_settings_aside()

    told = " ".join(capsys.readouterr().out.split())
    assert "LORRY_DATABASE_URL, LORRY_URL." in told
    assert not {"LORRY_URL", "LORRY_DATABASE_URL"} & os.environ.keys()
    assert os.environ["LORRY_DEMO_DIR"] == "/kept"
    assert os.environ["NO_PROXY"] == "corp.example,127.0.0.1,localhost"


@pytest.mark.usefixtures("environment")
def test_nothing_is_said_where_nothing_is_set(capsys: pytest.CaptureFixture[str]) -> None:
    surroundings.leave_settings_aside()

    assert capsys.readouterr().out == ""


def test_a_second_demo_in_the_folder_is_refused_until_the_first_is_over(tmp_path: Path) -> None:
    with (
        surroundings.alone_in(tmp_path),
        pytest.raises(DemoFailed, match=rf"process {os.getpid()}.*LORRY_DEMO_DIR"),
        surroundings.alone_in(tmp_path),
    ):
        pass

    with surroundings.alone_in(tmp_path):
        assert (tmp_path / "demo.lock").read_text() == f"{os.getpid()}\n"


def test_too_small_a_disk_is_told_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORRY_DEMO_DIR", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=500_000_000))

    with pytest.raises(DemoFailed, match=r"0\.5 GB of free space, but the demo needs 1\.0 GB.*LORRY_DEMO_DIR"):
        surroundings.folder()

    (tmp_path / "data/bases/x").mkdir(parents=True)
    (tmp_path / "data/bases/x/model.safetensors").touch()
    assert surroundings.folder() == tmp_path


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "Free space on that disk, or use"), (errno.EROFS, "Make the folder writable, or use")],
)
def test_a_folder_that_takes_nothing_comes_with_a_remedy(number: int, remedy: str) -> None:
    told = surroundings.told(OSError(number, os.strerror(number), "/x"))

    assert told.startswith(f"/x: {os.strerror(number)}. {remedy}")


def test_an_interrupt_while_the_demo_loads_ends_it_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "openai.py").write_text(INTERRUPTS)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py")], capture_output=True, text=True, env=environment, check=False
    )

    assert (done.returncode, done.stderr) == (130, "")
    assert done.stdout.count("\n") == 1


def test_a_second_interrupt_ends_the_service_at_once() -> None:
    asked: list[str] = []

    def wait(_seconds: float | None = None) -> None:
        asked.append("wait")
        if asked.count("wait") == 1:
            raise KeyboardInterrupt

    service._stop(SimpleNamespace(terminate=lambda: asked.append("terminate"), wait=wait))

    assert asked == ["terminate", "wait", "terminate", "wait"]
