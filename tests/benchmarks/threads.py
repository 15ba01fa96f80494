"""Contenders that run as threads of the test's process. Processes would each import torch again."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from queue import Queue
from threading import Thread
from typing import Any

import torch

from benchmarks.contenders.__main__ import CONTENDERS
from benchmarks.gate import Json
from benchmarks.workload import SEED


class ThreadGate:
    """The part of gate.Gate that a contender's code uses."""

    num_steps = None

    def __init__(self) -> None:
        self.requests: Queue[Json | None] = Queue()
        self.reports: Queue[Json | None] = Queue()

    def wait(self) -> Json:
        request = self.requests.get()
        if request is None:
            raise SystemExit
        return request

    def report(self, **figures: Any) -> None:
        self.reports.put({"seconds": 1.0, "cpu_seconds": 1.0, **figures})


class ThreadContender:
    """The part of gate.Contender that contenders with separate steps use.

    The thread starts at the first step, so a contender sets up alone and its random numbers are its own.
    """

    def __init__(self, name: str, **options: Any) -> None:
        self.name = name
        self._options = options
        self._gate = ThreadGate()
        self._thread = Thread(target=self._run)

    def step(self) -> Json:
        if self._thread.ident is None:
            self._thread.start()
        self._gate.requests.put({})
        report = self._gate.reports.get()
        assert report is not None, f"{self.name} exited"
        return report

    def close(self) -> None:
        self._gate.requests.put(None)
        self._thread.join()

    def _run(self) -> None:
        torch.manual_seed(SEED)
        try:
            with suppress(SystemExit):  # the test sends no more requests
                getattr(import_module(CONTENDERS[self.name]), self.name)(self._gate, self._options)
        finally:
            self._gate.reports.put(None)
