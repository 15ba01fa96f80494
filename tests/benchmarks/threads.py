"""Contenders as threads of the test's process, in place of processes that each import torch anew."""

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
    """What the code of a contender sees of gate.Gate."""

    num_steps = None

    def __init__(self) -> None:
        self.asked: Queue[Json | None] = Queue()
        self.reports: Queue[Json | None] = Queue()

    def wait(self) -> Json:
        request = self.asked.get()
        if request is None:
            raise SystemExit
        return request

    def report(self, **figures: Any) -> None:
        self.reports.put({"seconds": 1.0, "cpu_seconds": 1.0, **figures})


class ThreadContender:
    """gate.Contender as far as contenders that go step by step need it. One begins at its first step: it is alone
    while it sets up, so that its random numbers are its own."""

    def __init__(self, name: str, **options: Any) -> None:
        self.name = name
        self._options = options
        self._gate = ThreadGate()
        self._thread = Thread(target=self._run)

    def step(self) -> Json:
        if self._thread.ident is None:
            self._thread.start()
        self._gate.asked.put({})
        report = self._gate.reports.get()
        assert report is not None, f"{self.name} ended"
        return report

    def close(self) -> None:
        self._gate.asked.put(None)
        self._thread.join()

    def _run(self) -> None:
        torch.manual_seed(SEED)
        try:
            with suppress(SystemExit):  # nobody asks any more
                getattr(import_module(CONTENDERS[self.name]), self.name)(self._gate, self._options)
        finally:
            self._gate.reports.put(None)
