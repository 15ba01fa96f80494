"""Supervision of an API server and its workers, with fake processes and a fake clock."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from lorry.errors import LorryError
from lorry.local.supervisor import Patience, ServiceSupervisor


class FakeProcess:
    """Stops on `terminate`, unless it ignores SIGTERM."""

    def __init__(self, name: str, journal: list[str], *, ignores_sigterm: bool = False) -> None:
        self.name = name
        self.alive = False
        self._journal = journal
        self._ignores_sigterm = ignores_sigterm

    def start(self) -> None:
        self.alive = True
        self._journal.append(f"start {self.name}")

    def is_alive(self) -> bool:
        return self.alive

    def exit_status(self) -> int | None:
        return None if self.alive else 1

    def terminate(self) -> None:
        if self.alive:
            self._journal.append(f"terminate {self.name}")
            self.alive = self._ignores_sigterm

    def kill(self) -> None:
        if self.alive:
            self._journal.append(f"kill {self.name}")
            self.alive = False

    def wait(self) -> None:
        assert not self.alive, "it would never return"

    def log_tail(self) -> str:
        return f"last words of {self.name}"


class FakeServer(FakeProcess):
    """Becomes ready when the test sets `ready`."""

    ready = False

    def is_ready(self) -> bool:
        return self.alive and self.ready

    def give_up(self) -> None:
        self._journal.append(f"give up {self.name}")


class World:
    """Time advances only by sleeping. `at` schedules an action."""

    def __init__(self, *, ignores_sigterm: bool = False) -> None:
        self.now = 0.0
        self.journal: list[str] = []
        self.messages: list[str] = []
        self.ready_at = 1.0
        self.api = FakeProcess("api", self.journal)
        self.worker = FakeProcess("worker", self.journal, ignores_sigterm=ignores_sigterm)
        self.others: list[FakeServer] = []
        self.supervisor = ServiceSupervisor(
            self.api,
            [self.worker],
            is_ready=lambda: self.now >= self.ready_at,
            on_ready=self._note_ready,
            report=self.messages.append,
            patience=Patience(ready_seconds=20, drain_seconds=30, api_stop_seconds=5),
            clock=lambda: self.now,
            sleep=self._sleep,
        )
        self._plan: list[tuple[float, Callable[[], object]]] = []

    def at(self, seconds: float, act: Callable[[], object]) -> None:
        self._plan.append((seconds, act))

    def _note_ready(self) -> list[FakeServer]:
        self.journal.append("ready")
        return self.others

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 10_000, "the supervisor does not stop"
        due = [act for at, act in self._plan if at <= self.now]
        self._plan = [(at, act) for at, act in self._plan if at > self.now]
        for act in due:
            act()

    def crash_worker(self) -> None:
        self.worker.alive = False


def test_worker_starts_after_the_api_server_and_stops_before_it() -> None:
    world = World()
    world.at(5, world.supervisor.stop)

    assert world.supervisor.run() == 1
    assert world.journal == ["start api", "ready", "start worker", "terminate worker", "terminate api"]


def test_signals_drain() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        world = World()
        world.at(5, lambda number=number: os.kill(os.getpid(), number))

        assert world.supervisor.run() == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_worker_that_ignores_sigterm_is_killed_after_the_drain_time() -> None:
    world = World(ignores_sigterm=True)
    world.at(5, world.supervisor.stop)

    world.supervisor.run()

    assert world.journal[-3:] == ["terminate worker", "kill worker", "terminate api"]
    assert 34 < world.now < 36


def test_second_signal_kills_immediately() -> None:
    world = World(ignores_sigterm=True)
    world.at(5, world.supervisor.stop)
    world.at(6, world.supervisor.stop)

    assert world.supervisor.run() == 2
    assert "kill worker" in world.journal
    assert not world.api.alive
    assert world.now < 7


def test_restart_delay_of_a_crashing_worker_doubles() -> None:
    world = World()
    for seconds in (10, 20, 30, 40):
        world.at(seconds, world.crash_worker)
    world.at(60, world.supervisor.stop)

    world.supervisor.run()

    assert world.journal.count("start worker") == 5
    waits = [line.partition(" it in ")[2] for line in world.messages if "Restarting it" in line]
    assert waits == ["1 s.", "2 s.", "4 s.", "8 s."]
    assert any("last words of worker" in line for line in world.messages)


def test_restart_delay_resets_after_a_long_run() -> None:
    world = World()
    world.at(10, world.crash_worker)
    world.at(100, world.crash_worker)
    world.at(120, world.supervisor.stop)

    world.supervisor.run()

    assert sum("Restarting it in 1 s" in line for line in world.messages) == 2


def test_exit_of_the_api_server_stops_everything_and_shows_its_log() -> None:
    world = World()
    world.at(5, lambda: setattr(world.api, "alive", False))

    with pytest.raises(LorryError, match="last words of api"):
        world.supervisor.run()

    assert world.journal[-1] == "kill worker"


def test_failed_start_of_the_api_server_starts_no_worker() -> None:
    world = World()
    world.at(0.5, lambda: setattr(world.api, "alive", False))

    with pytest.raises(LorryError, match="did not start"):
        world.supervisor.run()

    assert world.journal == ["start api"]


def test_api_server_that_never_becomes_ready_is_killed() -> None:
    world = World()
    world.ready_at = 1e9

    with pytest.raises(LorryError, match="The API server did not become ready within"):
        world.supervisor.run()

    assert world.journal == ["start api", "kill api"]


def test_signal_during_the_start_stops_the_api_server() -> None:
    world = World()
    world.ready_at = 1e9
    world.at(2, world.supervisor.stop)

    assert world.supervisor.run() == 1
    assert world.journal == ["start api", "terminate api"]


def test_exited_api_server_is_not_ready_even_if_its_port_answers() -> None:
    world = World()
    world.api.start = lambda: world.journal.append("start api")  # it exits at once, as with a port in use
    world.ready_at = 0.0

    with pytest.raises(LorryError, match="did not start"):
        world.supervisor.run()

    assert world.journal == ["start api"]


def test_process_that_on_ready_returns_is_started_restarted_and_stopped() -> None:
    world = World()
    world.others = [FakeServer("server", world.journal)]
    world.at(5, lambda: setattr(world.others[0], "alive", False))
    world.at(20, world.supervisor.stop)

    world.supervisor.run()

    assert world.journal == [
        "start api", "ready", "start worker", "start server", "start server",
        "terminate worker", "terminate server", "terminate api",
    ]  # fmt: skip
    assert world.messages[0] == "The server ended (status 1). Restarting it in 1 s."


def test_server_that_never_becomes_ready_is_started_three_times() -> None:
    world = World()
    world.others = [FakeServer("server", world.journal)]
    for seconds in (5, 100, 200):  # each start runs long enough to count as healthy
        world.at(seconds, lambda: setattr(world.others[0], "alive", False))
    world.at(1000, world.supervisor.stop)

    world.supervisor.run()

    assert world.journal.count("start server") == 3
    assert world.journal.count("give up server") == 1
    assert sum("The server ended" in line for line in world.messages) == 2


def test_failed_starts_are_counted_anew_after_the_server_was_ready() -> None:
    world = World()
    server = FakeServer("server", world.journal)
    world.others = [server]
    for seconds in (5, 100, 200, 300, 400):
        world.at(seconds, lambda: setattr(server, "alive", False))
    world.at(150, lambda: setattr(server, "ready", True))
    world.at(250, lambda: setattr(server, "ready", False))
    world.at(1000, world.supervisor.stop)

    world.supervisor.run()

    assert world.journal.count("start server") == 6
    assert "give up server" not in world.journal
