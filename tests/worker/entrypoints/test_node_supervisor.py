"""A node's workers, one for each device group: the possible groups, and the supervision of the processes."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
from pydantic import SecretStr

from catalog.settings import Settings
from lorry.local.supervisor import LONGEST_RESTART_SECONDS
from worker.entrypoints import node_supervisor
from worker.entrypoints.node_supervisor import NodeSupervisor
from worker.node import devices
from worker.node.devices import Device


class FakeWorker:
    """Exits when its test sets a status, or on SIGTERM if it handles that signal."""

    def __init__(self, name: str, clock: Callable[[], float], *, handles_sigterm: bool) -> None:
        self.name = name
        self.starts: list[int] = []
        self.signals: list[int] = []
        self.status: int | None = None
        self._clock = clock
        self._handles_sigterm = handles_sigterm

    def start(self) -> None:
        self.starts.append(round(self._clock()))
        self.status = None

    def is_alive(self) -> bool:
        return bool(self.starts) and self.status is None

    def exit_status(self) -> int | None:
        return self.status

    def terminate(self) -> None:
        self.signals.append(signal.SIGTERM)
        if self._handles_sigterm:
            self.status = 0

    def kill(self) -> None:
        self.status = -signal.SIGKILL

    def wait(self) -> None:
        assert not self.is_alive(), "it would never return"

    def log_tail(self) -> str:
        return ""


class Node:
    """Fake workers, and a clock that each sleep advances. `at` schedules an action for a second."""

    def __init__(self, *names: str, handles_sigterm: bool = True) -> None:
        self.now = 0.0
        self.workers = {name: FakeWorker(name, lambda: self.now, handles_sigterm=handles_sigterm) for name in names}
        self._acts: list[tuple[float, Callable[[], None]]] = []
        self.supervisor = NodeSupervisor(list(self.workers.values()), clock=lambda: self.now, sleep=self._sleep)

    def at(self, second: float, act: Callable[[], None]) -> None:
        self._acts.append((second, act))

    def ends(self, name: str, status: int) -> Callable[[], None]:
        return lambda: setattr(self.workers[name], "status", status)

    def starts(self, name: str) -> list[int]:
        return self.workers[name].starts

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 1000, "it never exited"
        for due in [act for act in self._acts if act[0] <= self.now]:
            self._acts.remove(due)
            due[1]()


def test_each_group_has_one_worker_and_the_node_exits_when_all_have() -> None:
    on = Node("0", "1")
    on.at(1, on.ends("0", 0))
    on.at(2, on.ends("1", 0))

    assert on.supervisor.run() == 0

    assert (on.starts("0"), on.starts("1")) == ([0], [0])
    assert on.now < 3


def test_a_dead_worker_restarts_with_back_off_and_the_others_continue() -> None:
    on = Node("0", "1")
    for second in (1, 3, 6):
        on.at(second, on.ends("0", -9))
    on.at(100, on.ends("0", 1))  # it had run for a long time
    on.at(103, on.ends("0", 0))
    on.at(104, on.ends("1", 0))

    assert on.supervisor.run() == 0

    assert on.starts("0") == [0, 2, 5, 10, 101]
    assert on.starts("1") == [0]


def test_the_longest_restart_delay_is_half_a_minute() -> None:
    on = Node("0")
    for second in range(1, 400):
        on.at(second, on.ends("0", 1))
    on.at(400, lambda: on.supervisor.handle_signal(signal.SIGTERM))

    on.supervisor.run()

    waits = [later - earlier for earlier, later in zip(on.starts("0"), on.starts("0")[1:], strict=False)]
    assert max(waits) <= LONGEST_RESTART_SECONDS + 2


def test_a_signal_is_forwarded_to_every_worker_and_none_restarts() -> None:
    on = Node("0", "1")
    on.at(1, on.ends("0", 1))
    on.at(1.5, lambda: on.supervisor.handle_signal(signal.SIGTERM))

    assert on.supervisor.run() == 0

    assert on.workers["1"].signals == [signal.SIGTERM]
    assert on.starts("0") == [0]


def test_a_second_signal_is_forwarded_too_and_survivors_are_killed() -> None:
    on = Node("0", "1", handles_sigterm=False)
    on.at(1, lambda: on.supervisor.handle_signal(signal.SIGTERM))
    on.at(20, lambda: on.supervisor.handle_signal(signal.SIGTERM))
    on.at(21, on.ends("1", 143))

    assert on.supervisor.run() == 128 + signal.SIGTERM

    assert on.workers["0"].signals == on.workers["1"].signals == [signal.SIGTERM] * 2
    assert on.workers["0"].status == -signal.SIGKILL
    assert on.now == pytest.approx(20 + node_supervisor.AT_ONCE_SECONDS, abs=1)


@pytest.fixture
def four_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine with four GPUs and four cores."""
    gpus = [
        Device(kind="cuda", indices=(index,), uuids=(f"GPU-{index}",), name="GPU", memory_bytes=80)
        for index in range(4)
    ]
    monkeypatch.setattr(devices, "find_devices", lambda: gpus)
    monkeypatch.setattr(devices, "_own_cores", lambda: {0, 1, 2, 3})


@pytest.mark.usefixtures("four_of_each")
def test_groups_are_parsed_and_default_to_one_per_gpu() -> None:
    chosen = node_supervisor.choose(["0,1", "2", "3", "cpu:0-1", "cpu:2-3"])

    assert {text: device.indices or device.cores for text, device in chosen.items()} == {
        "0,1": (0, 1),
        "2": (2,),
        "3": (3,),
        "cpu:0-1": (0, 1),
        "cpu:2-3": (2, 3),
    }
    assert list(node_supervisor.choose([])) == ["0", "1", "2", "3"]


@pytest.mark.usefixtures("four_of_each")
@pytest.mark.parametrize(
    ("named", "message"),
    [
        (["0,1", "1,2"], "GPU 1 is in two groups, 0,1 and 1,2. Assign each device to one worker."),
        (["cpu:0-2", "cpu:2-3"], "Core 2 is in two groups"),
        (["cpu", "cpu:2-3"], "The CPU is in two groups"),
        (["4"], "This machine has no GPU 4"),
    ],
)
def test_overlapping_and_unknown_groups_are_rejected(named: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        node_supervisor.choose(named)


@pytest.mark.parametrize(
    ("arguments", "device", "groups"),
    [([], None, []), ([], "", []), ([], "auto", []), (["0", "1"], "2", ["0", "1"])],
)
def test_groups_are_named_by_arguments(arguments: list[str], device: str | None, groups: list[str]) -> None:
    given = {} if device is None else {"LORRY_DEVICE": device}

    assert node_supervisor._named_groups(arguments, given) == groups  # pyright: ignore[reportPrivateUsage]


def test_a_device_without_arguments_is_an_error_that_names_the_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_DEVICE", "2")

    with pytest.raises(SystemExit, match=r"Unset LORRY_DEVICE.*`lorry worker --groups 2`.*LORRY_GROUPS=2 in \.env"):
        node_supervisor.main([])


def test_a_group_of_cores_has_at_most_one_thread_per_core() -> None:
    half = Device(kind="cpu", cores=(0, 1), name="CPU", memory_bytes=1)
    whole = Device(kind="cpu", name="CPU", memory_bytes=1)

    def threads(device: Device, **given: str) -> str | None:
        return node_supervisor.group_environment("g", device, given).get("OMP_NUM_THREADS")

    assert [threads(half), threads(half, OMP_NUM_THREADS="16"), threads(half, OMP_NUM_THREADS="1")] == ["2", "2", "1"]
    assert [threads(whole), threads(whole, OMP_NUM_THREADS="16")] == [None, "16"]


def test_a_node_with_a_broker_runs_celery_and_one_without_the_loop() -> None:
    alone, celery = (node_supervisor.group_argv("0,1", has_broker=has_broker) for has_broker in (False, True))

    assert alone[-3:] == ["worker.entrypoints.loop", "--device", "0,1"]
    assert celery[-2:] == ["-n", "group-0-1@%h"]
    assert "worker.entrypoints.celery_worker" in celery


def test_gang_workers_poll_even_with_a_broker() -> None:
    without_broker, with_broker = Settings(redis_url=None), Settings(redis_url=SecretStr("redis://broker"))

    assert [node_supervisor.uses_broker(settings) for settings in (without_broker, with_broker)] == [False, True]
    assert not node_supervisor.uses_broker(with_broker.model_copy(update={"gang": "hall"}))
