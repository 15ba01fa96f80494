"""How contenders take turns: each is a process that waits at a gate before every step and reports after it.

So each has its interpreter, threads and memory to itself, warms up once, and is measured step by step beside
the others: what disturbs the machine disturbs all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.workload import ROOT

Json = dict[str, Any]


class Gate:
    """The contender's end. With `num_steps` it stands open for so many steps, and nothing is reported."""

    def __init__(self, num_steps: int | None = None) -> None:
        self.num_steps = num_steps
        self._reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # what libraries print is no report
        self.restart()

    def wait(self) -> Json:
        """What the other end asks for; its clocks start when this returns. Ends the process when nobody asks."""
        line = "{}" if self.num_steps is not None else sys.stdin.readline()
        if not line:
            raise SystemExit(0)
        self.restart()
        return json.loads(line)

    def restart(self) -> None:
        """What was done since `wait` doesn't count."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def seconds(self) -> float:
        """Since `wait`."""
        return time.perf_counter() - self._wall

    def report(self, **figures: Any) -> None:
        """`seconds` and `cpu_seconds` since `wait`, and what else there is to tell."""
        clocks = {"seconds": time.perf_counter() - self._wall, "cpu_seconds": time.process_time() - self._cpu}
        if self.num_steps is None:
            self._reports.write(json.dumps(clocks | figures) + "\n")
            self._reports.flush()


class Contender:
    """The measuring end: a child process that does one step at a time."""

    def __init__(self, name: str, *, threads: int, log: Path, **options: Any) -> None:
        self.name = name
        self._log = log
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
                env=environment(threads),
                cwd=ROOT,
                text=True,
            )

    def step(self, **request: Any) -> Json:
        """One step's report. Raises RuntimeError, with what the child printed last, where it ended instead."""
        self.begin(**request)
        return self.report()

    def begin(self, **request: Any) -> None:
        """Let it make a step, beside what others do."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def report(self) -> Json:
        """Of the step that was begun; raises as `step` does."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended:\n{self._log.read_text(errors='replace')[-4000:]}")
        return json.loads(line)

    def finish(self) -> int:
        """Wait for a contender that was told its number of steps: the most memory that it had, in bytes. Raises
        RuntimeError where it failed."""
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


def environment(threads: int) -> dict[str, str]:
    """No network; threads that wait don't spin."""
    ours = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELIZM": "false"}
    return os.environ | ours | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
