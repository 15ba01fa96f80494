"""Supervises child processes: the service of `lorry up`, and the workers of a node of `lorry worker`.

`ProcessSupervisor` restarts processes that exit. `ServiceSupervisor` adds the API server of `lorry up` and the order of
starting and stopping. Neither knows what the processes do.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from lorry.errors import LorryError

FIRST_RESTART_SECONDS = 1.0
LONGEST_RESTART_SECONDS = 30.0
HEALTHY_SECONDS = 60.0
"""A process that ran at least this long is restarted after the shortest delay."""
TICK_SECONDS = 0.1
MAX_FAILED_STARTS = 3
"""After this number of starts in a row that ended before a server was ready, it is not started again."""
READY_CHECK_SECONDS = 1.0


class Process(Protocol):
    """The interface of a supervised child."""

    name: str

    def start(self) -> None: ...
    def is_alive(self) -> bool: ...
    def exit_status(self) -> int | None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def wait(self) -> None: ...
    def log_tail(self) -> str: ...


class Server(Process, Protocol):
    """A process that may fail long after its start, before it is ready."""

    def is_ready(self) -> bool: ...
    def give_up(self) -> None:
        """Report that the process is not started again, after MAX_FAILED_STARTS."""
        ...


@dataclass(kw_only=True, slots=True)
class _Supervised:
    """A process and its restart state."""

    process: Process
    is_started: bool = False
    """True until its exit is reported."""
    started_at: float = 0.0
    num_crashes: int = 0
    server: Server | None = None
    """The process, if it becomes ready only after its start."""
    was_ready: bool = False
    num_failed_starts: int = 0
    check_ready_at: float = 0.0
    restart_at: float | None = 0.0
    """None: it is running, or it has exited and is not restarted."""


class ProcessSupervisor:
    """Starts processes, and restarts each one that exits. The delay doubles with each crash."""

    def __init__(
        self,
        processes: Sequence[Process],
        *,
        on_exit: Callable[[Process, int, float | None], None],
        restarts_after_success: bool,
        clock: Callable[[], float],
    ) -> None:
        """`on_exit` receives a process that exited, its status, and the seconds until its restart (None: never)."""
        self._supervised = [_Supervised(process=process) for process in processes]
        self._on_exit = on_exit
        self._restarts_after_success = restarts_after_success
        self._clock = clock
        self._is_stopping = False

    def add(self, server: Server) -> None:
        """Supervise a server too, which the next check starts."""
        self._supervised.append(_Supervised(process=server, server=server))

    def stop_restarts(self) -> None:
        """Restart no process from now on. May be called by a signal handler."""
        self._is_stopping = True

    @property
    def is_active(self) -> bool:
        """Whether a process is running or will be restarted."""
        may_restart = not self._is_stopping
        return any(entry.is_started or (may_restart and entry.restart_at is not None) for entry in self._supervised)

    def running(self) -> list[Process]:
        return [entry.process for entry in self._supervised if entry.process.is_alive()]

    def check(self) -> None:
        """Report each process that has exited, and start each one that is due."""
        for entry in self._supervised:
            now = self._clock()
            if entry.is_started and (status := entry.process.exit_status()) is not None:
                entry.is_started = False
                self._schedule_restart(entry, status, now)
            is_due = not entry.is_started and entry.restart_at is not None and now >= entry.restart_at
            if is_due and not self._is_stopping:
                entry.process.start()
                entry.is_started, entry.started_at, entry.restart_at = True, now, None
                entry.was_ready = False
            if entry.is_started and entry.server is not None and not entry.was_ready and now >= entry.check_ready_at:
                entry.was_ready, entry.check_ready_at = entry.server.is_ready(), now + READY_CHECK_SECONDS

    def _schedule_restart(self, entry: _Supervised, status: int, now: float) -> None:
        if self._is_stopping or (status == 0 and not self._restarts_after_success):
            self._on_exit(entry.process, status, None)
            return
        entry.num_failed_starts = 0 if entry.was_ready else entry.num_failed_starts + 1
        if entry.server is not None and entry.num_failed_starts == MAX_FAILED_STARTS:
            entry.server.give_up()
            return
        entry.num_crashes = 1 if now - entry.started_at >= HEALTHY_SECONDS else entry.num_crashes + 1
        wait = min(LONGEST_RESTART_SECONDS, FIRST_RESTART_SECONDS * 2.0 ** (entry.num_crashes - 1))
        entry.restart_at = now + wait
        self._on_exit(entry.process, status, wait)


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """Time limits in seconds."""

    ready_seconds: float = 120.0
    drain_seconds: float = 60.0
    api_stop_seconds: float = 15.0


class ServiceSupervisor:
    """Runs an API server, and workers alongside it. The first signal drains: workers stop, then the API server. A
    second signal kills all processes. `on_ready` returns servers to run as the workers.

    `run` returns the number of signals received. Raises LorryError if the API server exits.
    """

    def __init__(
        self,
        api: Process,
        workers: Sequence[Process],
        *,
        is_ready: Callable[[], bool],
        on_ready: Callable[[], Sequence[Server]],
        report: Callable[[str], None],
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._api = api
        self._workers = ProcessSupervisor(workers, on_exit=self._report_exit, restarts_after_success=True, clock=clock)
        self._is_ready = is_ready
        self._on_ready = on_ready
        self._report = report
        self._patience = patience or Patience()
        self._clock = clock
        self._sleep = sleep
        self._num_signals = 0

    def stop(self) -> None:
        """Handle a signal: the first drains, the second kills."""
        self._num_signals += 1

    def run(self) -> int:
        with self._signals():
            try:
                self._api.start()
                self._wait_until_ready()
                if self._num_signals == 0:
                    for server in self._on_ready():
                        self._workers.add(server)
                    self._keep_running()
                self._drain()
            finally:
                _kill([*self._workers.running(), self._api])
        return self._num_signals

    def _wait_until_ready(self) -> None:
        deadline = self._clock() + self._patience.ready_seconds
        while self._num_signals == 0:
            self._check_api("did not start")  # first: if the API server exited, a ready answer comes from another one
            if self._is_ready():
                return
            if self._clock() > deadline:
                raise _failed(self._api, f"did not become ready within {self._patience.ready_seconds:g} s")
            self._sleep(TICK_SECONDS)

    def _keep_running(self) -> None:
        while self._num_signals == 0:
            self._check_api("ended")
            self._workers.check()
            self._sleep(TICK_SECONDS)

    def _report_exit(self, worker: Process, status: int, wait: float | None) -> None:
        assert wait is not None, "every process that ends is restarted"
        self._report(f"The {worker.name} ended (status {status}). Restarting it in {wait:g} s.")
        if tail := _indented(worker.log_tail()):
            self._report(tail)

    def _drain(self) -> None:
        """Stop workers first, so that they can still record their progress."""
        workers = self._workers.running()
        if workers:
            hint = " Press Ctrl-C again to stop immediately." if sys.stdin.isatty() else ""
            self._report(f"Stopping: jobs are saving checkpoints.{hint}")
        self._end(workers, self._patience.drain_seconds)
        self._end([self._api], self._patience.api_stop_seconds)

    def _end(self, processes: Sequence[Process], seconds: float) -> None:
        for process in processes:
            process.terminate()
        deadline = self._clock() + seconds
        while any(process.is_alive() for process in processes) and self._clock() < deadline and self._num_signals < 2:
            self._sleep(TICK_SECONDS)
        _kill(processes)

    def _check_api(self, what: str) -> None:
        if not self._api.is_alive():
            raise _failed(self._api, f"{what} (exit status {self._api.exit_status()})")

    @contextmanager
    def _signals(self) -> Generator[None]:
        def stop_on_signal(_number: int, _frame: FrameType | None) -> None:
            self.stop()

        stop_signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, stop_on_signal) for number in stop_signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _kill(processes: Sequence[Process]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def _failed(api: Process, what: str) -> LorryError:
    tail = _indented(api.log_tail())
    if tail:
        return LorryError("api_server_failed", event=what, tail=tail, api=api.name)
    return LorryError("api_server_failed_silently", event=what, api=api.name)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
