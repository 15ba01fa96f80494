"""Keeps the api and the workers running, and ends them in the right order. Knows nothing of what they do.

A worker that ends is started again after a while; the api ending ends everything. The first signal drains:
workers, then the api. A second one kills.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from lorry.errors import LorryError

_FIRST_RESTART_SECONDS = 1.0
_LONGEST_RESTART_SECONDS = 30.0
_HEALTHY_SECONDS = 60.0
_TICK_SECONDS = 0.1


class Process(Protocol):
    """What the supervisor needs of a child."""

    name: str

    def start(self) -> None: ...
    def is_alive(self) -> bool: ...
    def exit_status(self) -> int | None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def log_tail(self) -> str: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """Seconds that each part may take."""

    ready_seconds: float = 120.0
    drain_seconds: float = 60.0
    api_stop_seconds: float = 15.0


@dataclass(kw_only=True, slots=True)
class _Kept:
    """A worker with what decides when it is started again."""

    process: Process
    started_at: float = 0.0
    num_crashes: int = 0
    restart_at: float | None = None


class ProcessSupervisor:
    """`run` returns how many signals ended it: 1 is a drain, more a kill. Raises LorryError if the api ends."""

    def __init__(
        self,
        api: Process,
        workers: Sequence[Process],
        *,
        is_ready: Callable[[], bool],
        on_ready: Callable[[], None],
        say: Callable[[str], None],
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._api = api
        self._workers = [_Kept(process=worker) for worker in workers]
        self._is_ready = is_ready
        self._on_ready = on_ready
        self._say = say
        self._patience = patience or Patience()
        self._clock = clock
        self._sleep = sleep
        self._num_signals = 0

    def stop(self) -> None:
        """What a signal does: the first time drain, then kill."""
        self._num_signals += 1

    def run(self) -> int:
        with self._signals():
            try:
                self._api.start()
                self._wait_until_ready()
                if self._num_signals == 0:
                    self._on_ready()
                    self._keep_running()
                self._drain()
            finally:
                self._kill_all()
        return self._num_signals

    def _wait_until_ready(self) -> None:
        deadline = self._clock() + self._patience.ready_seconds
        while self._num_signals == 0:
            self._check_api("did not start")  # first: an API server that ended can't be ready, whatever answers
            if self._is_ready():
                return
            if self._clock() > deadline:
                raise _failed(self._api, "does not answer")
            self._sleep(_TICK_SECONDS)

    def _keep_running(self) -> None:
        for worker in self._workers:
            self._start(worker)
        while self._num_signals == 0:
            self._check_api("ended")
            for worker in self._workers:
                self._keep(worker)
            self._sleep(_TICK_SECONDS)

    def _keep(self, worker: _Kept) -> None:
        if worker.process.is_alive():
            return
        now = self._clock()
        if worker.restart_at is None:
            healthy = now - worker.started_at >= _HEALTHY_SECONDS
            worker.num_crashes = 1 if healthy else worker.num_crashes + 1
            wait = min(_LONGEST_RESTART_SECONDS, _FIRST_RESTART_SECONDS * 2.0 ** (worker.num_crashes - 1))
            worker.restart_at = now + wait
            status = worker.process.exit_status()
            self._say(f"The {worker.process.name} ended (status {status}); starting it again in {wait:g} s.")
            self._say(_indented(worker.process.log_tail()))
        elif now >= worker.restart_at:
            self._start(worker)

    def _start(self, worker: _Kept) -> None:
        worker.process.start()
        worker.started_at, worker.restart_at = self._clock(), None

    def _drain(self) -> None:
        """Workers first, so that they can still record where they stopped."""
        workers = [worker.process for worker in self._workers if worker.process.is_alive()]
        if workers:
            self._say("Stopping: jobs save where they are. Press Ctrl-C again to stop at once.")
        self._end(workers, self._patience.drain_seconds)
        self._end([self._api], self._patience.api_stop_seconds)

    def _end(self, processes: Sequence[Process], seconds: float) -> None:
        for process in processes:
            process.terminate()
        deadline = self._clock() + seconds
        while any(process.is_alive() for process in processes) and self._clock() < deadline and self._num_signals < 2:
            self._sleep(_TICK_SECONDS)
        for process in processes:
            process.kill()

    def _kill_all(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        self._api.kill()

    def _check_api(self, what: str) -> None:
        if not self._api.is_alive():
            raise _failed(self._api, f"{what} (status {self._api.exit_status()})")

    @contextmanager
    def _signals(self) -> Generator[None]:
        def hear(_number: int, _frame: FrameType | None) -> None:
            self.stop()

        heard = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, hear) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _failed(process: Process, what: str) -> LorryError:
    return LorryError(
        f"The {process.name} {what}. Its last lines:\n{_indented(process.log_tail())}",
        code="service_failed",
        remedy="Mend what they say, then start again.",
    )


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
