"""A standby trainer: one at a time, harmless when it exits, and like any other once it has its settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.engine.warm_up import warm_up
from lorry.local.parent_watch import LOST_PARENT
from tests import tiny_base
from tests.worker.trainer_settings import trainer_settings
from tests.worker_site import WAIT_SECONDS, wait_until
from worker.node import devices as node
from worker.process import standby
from worker.process.launcher import TrainerProcess
from worker.process.standby import Standby, stand_by
from worker.protocol.mailbox import EventReader, Json, TrainerDirectory


class FakeProcess:
    """Runs until it is closed, or until `returncode` is set."""

    def __init__(self, directory: TrainerDirectory) -> None:
        self.directory = directory
        self.returncode: int | None = None
        self.num_heartbeats = 0

    def send_heartbeat(self, began_at: float | None = None) -> None:
        self.num_heartbeats += 1

    def close(self) -> None:
        self.returncode = -9

    def memory_bytes(self) -> int:
        return 7


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[FakeProcess]:
    """Return the fake processes that were started in place of real ones."""
    found: list[FakeProcess] = []

    def launch(
        directory: TrainerDirectory,
        _device: node.Device,
        *,
        silence_seconds: float,
        bases_dir: Path,
        num_processes: int,
        in_gang: bool,
    ) -> FakeProcess:
        assert (silence_seconds, num_processes) == (6, 1)
        assert not directory.has_begun()
        found.append(FakeProcess(directory))
        return found[-1]

    monkeypatch.setattr(standby, "launch", launch)
    return found


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[Standby]:
    waiting = Standby(tmp_path, node.cpu(), silence_seconds=6, bases_dir=tmp_path)
    yield waiting
    waiting.close()


def folders(path: Path) -> list[str]:
    return sorted(found.name for found in path.iterdir())


def test_only_one_standby_is_started(tmp_path: Path, waiting: Standby, launched: list[FakeProcess]) -> None:
    assert waiting.memory_bytes() == 0

    waiting.prepare()
    waiting.prepare()
    waiting.send_heartbeat()

    (process,) = launched
    assert process.num_heartbeats == 1
    assert waiting.memory_bytes() == 7
    assert folders(tmp_path) == [process.directory.path.name, f"{process.directory.path.name}.lock"]


def test_a_standby_is_taken_once_and_closed_by_its_user(
    tmp_path: Path, waiting: Standby, launched: list[FakeProcess]
) -> None:
    waiting.prepare()

    with ExitStack() as stack:
        taken = waiting.take(stack)
        assert taken is launched[0]
        assert waiting.take(stack) is None
        waiting.close()
        waiting.send_heartbeat()
        assert (launched[0].returncode, launched[0].num_heartbeats) == (None, 1)

    assert launched[0].returncode == -9
    assert folders(tmp_path) == []


def test_a_crashed_standby_is_replaced_only_after_the_next_trainer(
    tmp_path: Path, waiting: Standby, launched: list[FakeProcess], caplog: pytest.LogCaptureFixture
) -> None:
    waiting.prepare()
    launched[0].directory.log_path.write_text("ImportError: no torch")
    launched[0].returncode = 1

    waiting.prepare()
    waiting.prepare()

    assert len(launched) == 1
    assert caplog.text.count("ImportError: no torch") == 1
    assert folders(tmp_path) == []
    with ExitStack() as stack:
        assert waiting.take(stack) is None
    waiting.prepare()
    assert len(launched) == 2


def test_a_standby_that_lost_its_parent_is_replaced_immediately(
    tmp_path: Path, waiting: Standby, launched: list[FakeProcess], caplog: pytest.LogCaptureFixture
) -> None:
    waiting.prepare()
    launched[0].returncode = LOST_PARENT

    waiting.prepare()

    assert len(launched) == 2
    assert caplog.text == ""
    assert folders(tmp_path) == [launched[1].directory.path.name, f"{launched[1].directory.path.name}.lock"]


def test_output_of_a_standby_is_not_in_the_log_tail_of_its_jobs(waiting: Standby, launched: list[FakeProcess]) -> None:
    waiting.prepare()
    directory = launched[0].directory
    directory.log_path.write_text("MemoryError\n")

    directory.begin({})
    with directory.log_path.open("a") as log:
        log.write("Segmentation fault\n")

    assert directory.log_tail() == "Segmentation fault\n"


def test_a_dead_standby_is_not_taken_and_its_folder_is_deleted(
    tmp_path: Path, waiting: Standby, launched: list[FakeProcess]
) -> None:
    waiting.prepare()
    launched[0].returncode = 113

    with ExitStack() as stack:
        assert waiting.take(stack) is None

    assert folders(tmp_path) == []


@pytest.mark.parametrize("error", [OSError("No such disk"), BlockingIOError(11, "Resource temporarily unavailable")])
def test_a_worker_continues_if_no_standby_can_be_started(
    tmp_path: Path, waiting: Standby, monkeypatch: pytest.MonkeyPatch, error: OSError, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(standby, "launch", fail)

    waiting.prepare()
    waiting.prepare()

    assert caplog.text.count("No standby trainer could be started") == 1
    assert folders(tmp_path) == []


def next_event(events: EventReader, process: TrainerProcess) -> Json:
    """Wait for the trainer's next events and return the first one."""
    received: list[Json] = []
    wait_until(lambda: received.extend(events.read()) or received, message=process.directory.log_tail)
    return received[0]


@pytest.mark.slow
def test_a_real_standby_reports_that_it_waits_and_then_loads_its_base(tmp_path: Path, waiting: Standby) -> None:
    base_dir = tiny_base.make(tmp_path / "base")
    waiting = Standby(tmp_path, node.cpu(), silence_seconds=WAIT_SECONDS, bases_dir=tmp_path)
    waiting.prepare()

    with ExitStack() as stack:
        process = waiting.take(stack)
        assert process is not None
        events = EventReader(process.directory)
        assert next_event(events, process)["type"] == "standing_by"
        assert not (process.directory.path / "warm-up").exists()
        assert process.memory_bytes() > 10**8
        process.begin(trainer_settings(base_dir))
        ready = next_event(events, process)

    assert (ready["type"], ready["invariance"]) == ("ready", "bitwise"), process.directory.log_tail()
    assert process.returncode == -9
    assert process.memory_bytes() == 0


def test_a_warm_up_leaves_no_files_and_the_same_random_state(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()

    warm_up(tmp_path / "warm-up")

    assert torch.equal(torch.random.get_rng_state(), before)
    assert folders(tmp_path) == []


@pytest.mark.parametrize(("devices", "is_warmed"), [("", True), ("0", False), (None, False)])
def test_cpu_kernels_are_warmed_up_only_if_no_gpu_is_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: str | None, is_warmed: bool
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if devices is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    directory = TrainerDirectory.create(tmp_path / "trainer", {})
    warmed: list[Path] = []

    stand_by(directory, warmed.append)

    assert bool(warmed) is is_warmed


def test_a_failed_warm_up_is_logged_and_the_standby_still_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    directory = TrainerDirectory.create(tmp_path / "trainer", {})

    def fail(_: Path) -> None:
        raise RuntimeError("no such kernel")

    stand_by(directory, fail)

    assert "no such kernel" in capsys.readouterr().err
    assert [event["type"] for event in EventReader(directory).read()] == ["standing_by"]
