"""A trainer that stands by: one at a time, no harm to anybody when it ends, and like any other once it is told."""

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
from tests.worker_site import WAIT_SECONDS, wait_until
from worker.node import devices as node
from worker.process import standby
from worker.process.launcher import TrainerProcess
from worker.process.standby import Standby, stand_by
from worker.protocol.mailbox import EventReader, Json, TrainerDirectory


class FakeProcess:
    """Lives until it is closed, or until `returncode` is set."""

    def __init__(self, directory: TrainerDirectory) -> None:
        self.directory = directory
        self.returncode: int | None = None
        self.num_heartbeats = 0

    def send_heartbeat(self) -> None:
        self.num_heartbeats += 1

    def close(self) -> None:
        self.returncode = -9

    def memory_bytes(self) -> int:
        return 7


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[FakeProcess]:
    """Every process that was started in place of a real one."""
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


def test_one_stands_by_and_no_second_one(tmp_path: Path, waiting: Standby, launched: list[FakeProcess]) -> None:
    assert waiting.memory_bytes() == 0

    waiting.prepare()
    waiting.prepare()
    waiting.send_heartbeat()

    (process,) = launched
    assert process.num_heartbeats == 1
    assert waiting.memory_bytes() == 7
    assert folders(tmp_path) == [process.directory.path.name, f"{process.directory.path.name}.lock"]


def test_it_is_taken_once_and_ends_with_who_took_it(
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


def test_one_that_ended_by_itself_is_not_taken_and_not_tried_again_before_the_next_trainer(
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


def test_one_that_missed_its_stopped_worker_is_followed_by_another(
    tmp_path: Path, waiting: Standby, launched: list[FakeProcess], caplog: pytest.LogCaptureFixture
) -> None:
    waiting.prepare()
    launched[0].returncode = LOST_PARENT

    waiting.prepare()

    assert len(launched) == 2
    assert caplog.text == ""
    assert folders(tmp_path) == [launched[1].directory.path.name, f"{launched[1].directory.path.name}.lock"]


def test_what_a_trainer_printed_while_it_stood_by_is_not_told_of_its_jobs(
    waiting: Standby, launched: list[FakeProcess]
) -> None:
    waiting.prepare()
    directory = launched[0].directory
    directory.log_path.write_text("MemoryError\n")

    directory.begin({})
    with directory.log_path.open("a") as log:
        log.write("Segmentation fault\n")

    assert directory.log_tail() == "Segmentation fault\n"


def test_a_dead_one_leaves_its_place_to_a_trainer_that_is_launched(
    tmp_path: Path, waiting: Standby, launched: list[FakeProcess]
) -> None:
    waiting.prepare()
    launched[0].returncode = 113

    with ExitStack() as stack:
        assert waiting.take(stack) is None

    assert folders(tmp_path) == []


@pytest.mark.parametrize("error", [OSError("No such disk"), BlockingIOError(11, "Resource temporarily unavailable")])
def test_where_none_can_be_started_the_worker_goes_on_without(
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
    """The first of what the trainer says next."""
    heard: list[Json] = []
    wait_until(lambda: heard.extend(events.read()) or heard, said=process.directory.log_tail)
    return heard[0]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_real_one_loads_the_base_that_it_is_told_and_says_before_that_it_waits(
    tmp_path: Path, waiting: Standby
) -> None:
    base_dir = str(tiny_base.make(tmp_path / "base"))
    waiting = Standby(tmp_path, node.cpu(), silence_seconds=WAIT_SECONDS, bases_dir=tmp_path)
    waiting.prepare()

    with ExitStack() as stack:
        process = waiting.take(stack)
        assert process is not None
        events = EventReader(process.directory)
        assert next_event(events, process)["type"] == "standing_by"
        assert not (process.directory.path / "warm-up").exists()
        assert process.memory_bytes() > 10**8
        process.begin({"base_dir": base_dir, "dtype": "float32", "quantization": "none", "device": "cpu"})
        ready = next_event(events, process)

    assert (ready["type"], ready["invariance"]) == ("ready", "bitwise"), process.directory.log_tail()
    assert process.returncode == -9
    assert process.memory_bytes() == 0


def test_a_warm_up_leaves_neither_files_nor_other_random_numbers(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()

    warm_up(tmp_path / "warm-up")

    assert torch.equal(torch.random.get_rng_state(), before)
    assert folders(tmp_path) == []


@pytest.mark.parametrize(("devices", "is_warmed"), [("", True), ("0", False), (None, False)])
def test_kernels_of_a_cpu_are_loaded_where_no_gpu_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: str | None, is_warmed: bool
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if devices is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    directory = TrainerDirectory.create(tmp_path / "trainer", {})
    warmed: list[Path] = []

    stand_by(directory, warmed.append)

    assert bool(warmed) is is_warmed


def test_a_warm_up_that_fails_is_told_in_the_log_and_the_trainer_waits_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    directory = TrainerDirectory.create(tmp_path / "trainer", {})

    def fail(_: Path) -> None:
        raise RuntimeError("no such kernel")

    stand_by(directory, fail)

    assert "no such kernel" in capsys.readouterr().err
    assert [event["type"] for event in EventReader(directory).read()] == ["standing_by"]
