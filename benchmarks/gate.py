"""Alternates between contenders: each is a process that waits at a gate before every step and reports after it.

Each contender has its own interpreter, threads and memory, warms up once, and is measured alternately with the others.
Other load on the machine therefore affects all of them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.workload import ROOT

Json = dict[str, Any]
ABORT_SECONDS = 5.0
GPU_VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
"""Those of a trainer (worker/process/launcher.py)."""


class Gate:
    """The contender's side. With `num_steps` the gate is open for that number of steps, and nothing is reported."""

    def __init__(self, num_steps: int | None = None) -> None:
        self.num_steps = num_steps
        self._reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # redirects what libraries print, because stdout carries the reports
        self.restart()

    def wait(self) -> Json:
        """Wait for the next request and return it. The clocks start when this returns. Exits at the end of input."""
        line = "{}" if self.num_steps is not None else sys.stdin.readline()
        if not line:
            raise SystemExit(0)
        self.restart()
        return json.loads(line)

    def restart(self) -> None:
        """Restart the clocks."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def report(self, **figures: Any) -> None:
        """Report `seconds` and `cpu_seconds` since `wait` or `restart`, and `figures`."""
        synchronize()
        clocks = {"seconds": time.perf_counter() - self._wall, "cpu_seconds": time.process_time() - self._cpu}
        if self.num_steps is None:
            self._reports.write(json.dumps(clocks | figures) + "\n")
            self._reports.flush()


class Contender:
    """The measuring side: a child process that runs one step at a time."""

    def __init__(
        self,
        name: str,
        *,
        threads: int,
        log: Path,
        patience_seconds: float | None = None,
        **options: Any,
    ) -> None:
        """A report that takes longer than `patience_seconds` ends the process, with its stacks in the log."""
        self.name = name
        self._log = log
        self._patience_seconds = patience_seconds
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "benchmarks.contenders",
                    name,
                    json.dumps(options | {"threads": threads}),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment(threads, on_cpu=options.get("device", "cpu") == "cpu"),
                cwd=ROOT,
                text=True,
            )

    def step(self, **request: Any) -> Json:
        """Run one step and return its report. Raises RuntimeError with the end of the log if the child exited."""
        self.begin(**request)
        return self.report()

    def begin(self, **request: Any) -> None:
        """Start a step without waiting for it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def report(self) -> Json:
        """Wait for the report of the started step. Raises RuntimeError as `step` does."""
        assert self._process.stdout is not None
        timers = [threading.Timer(seconds, self._process.send_signal, [number]) for seconds, number in self._signals()]
        for timer in timers:
            timer.start()
        line = self._process.stdout.readline()
        for timer in timers:
            timer.cancel()
        if not line:
            raise RuntimeError(f"{self.name} exited:\n{self._log.read_text(errors='replace')[-4000:]}")
        return json.loads(line)

    def _signals(self) -> list[tuple[float, signal.Signals]]:
        """Return what ends a late process: at SIGABRT, Python writes the stacks, unless the device blocks it."""
        late = self._patience_seconds
        return [] if late is None else [(late, signal.SIGABRT), (late + ABORT_SECONDS, signal.SIGKILL)]

    def finish(self) -> int:
        """Wait for the exit of a contender with a fixed number of steps. Return its peak memory in bytes.

        Raises RuntimeError if it failed.
        """
        _, status, used = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        if self._process.returncode != 0:
            raise RuntimeError(f"{self.name} failed:\n{self._log.read_text(errors='replace')[-4000:]}")
        self.close()
        return used.ru_maxrss * 1024

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


def environment(threads: int, *, on_cpu: bool) -> dict[str, str]:
    """Return an environment without network access, in which waiting threads don't spin."""
    ours = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    ours |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONFAULTHANDLER": "1"}
    return os.environ | ours | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else GPU_VARIABLES)


def synchronize() -> None:
    """Wait until the GPU has computed what this process has launched, if it uses one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
