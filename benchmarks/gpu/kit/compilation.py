"""Compiles the kernels that ship in parallel processes, which also try them, and then chooses an engine's kernels.

Triton keeps compiled kernels on disk, where later stages find them. If a kernel makes the device unusable, that ends
one of these processes. The stages then run without the kernels of its family, as after a trial that does not end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import IO

import torch

from benchmarks.gpu.kit.kit import Kit
from lora_core.kernels.gpu.attention_trial import TILED_HEADS
from lora_core.kernels.gpu.trials import TRIED
from lora_core.kernels.selection import choose_kernels

MOST_PROCESSES = 16
TRIALS = {
    "lora": ("lora_core.kernels.gpu.trials", "why_lora_differs"),
    "elementwise": ("lora_core.kernels.gpu.elementwise_trial", "why_trial_failed"),
    "attention": ("lora_core.kernels.gpu.attention_trial", "why_attention_differs"),
    "decoding": ("lora_core.kernels.gpu.decoding_trial", "why_decoding_differs"),
    "random": ("lora_core.kernels.gpu.random_numbers_trial", "why_not_drawn"),
}
"""The function by which an engine tries the kernels of each family."""
LEFT_OUT: set[str] = set()
"""Families whose kernels this process does without."""
ENDLESS_SECONDS = 25
"""Minimum time of a trial that does not end, if it still runs when its stage is over."""
Job = tuple[str, ...]
"""Family, dtype and arguments of trial_job.py."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """The process of a job, and a file with its output."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]
    started: float

    def ended(self) -> dict[str, str | None]:
        """Return the result: `reason`, `fault`, or `error` if the process failed otherwise.

        torch may print warnings after the result, and a process may crash when it exits.
        """
        self.output.seek(0)
        lines = self.output.read().decode("utf-8", "replace").strip().splitlines() or [""]
        for line in reversed(lines):
            if line.startswith("{"):
                with suppress(json.JSONDecodeError):
                    return json.loads(line)
        status = self.process.returncode
        is_fault = status < 0 and status != -signal.SIGKILL  # which the system sends if memory runs out
        return {"fault" if is_fault else "error": f"status {status}: {lines[-1]}"}


def compilation(kit: Kit) -> None:
    if kit.on_gpu:
        run_jobs(kit, jobs())
    else:
        kit.tell_missing_gpu("compilation in parallel processes", "Triton compiles for a GPU")
    kit.progress.left_out = left_out()  # also for another process, if a trial in this one ends or blocks it
    kit.progress.write()
    with kit.attempt("choice of kernels"):
        _choose(kit)


def jobs() -> list[Job]:
    """Return the trials of all kernels that the stages use. Those that take longest are first."""
    heads = [(dtype, size) for dtype, widest in TILED_HEADS.items() for size in (256, 128, 64) if size <= widest]
    return [
        *(("lora", "bfloat16", str(number)) for number in reversed(range(len(TRIED)))),
        *(("elementwise", dtype) for dtype in ("bfloat16", "float32")),
        ("random", "uint8"),
        *(
            (family, str(dtype).removeprefix("torch."), str(size), cap)
            for family in ("attention", "decoding")
            for dtype, size in [*heads, (torch.float32, 16)]  # 16 are those of the tiny models
            for cap in ("capped", "uncapped")
        ),
    ]


def run_jobs(kit: Kit, jobs: Sequence[Job]) -> None:
    """Run each job in a process of its own, several at a time. Leaves out the families of jobs that fault or hang."""
    most, waiting = min(MOST_PROCESSES, len(os.sched_getaffinity(0))), list(jobs)
    running: dict[Job, Running] = {}
    try:
        while waiting or running:
            while waiting and len(running) < most:
                job = waiting.pop(0)
                running[job] = _started(kit, job)
            for job in [job for job, each in running.items() if each.process.poll() is not None]:
                _end(kit, job, running.pop(job))
            time.sleep(0.02)
    finally:
        for job, each in running.items():
            seconds = time.perf_counter() - each.started
            each.process.kill()
            with suppress(subprocess.TimeoutExpired):  # a process that waits for the device may not end
                each.process.wait(timeout=1)
            each.output.close()
            kit.tell(_name(job), "stopped", "text", seconds=seconds)
            if seconds > ENDLESS_SECONDS:
                leave_out([job[0]])


def _started(kit: Kit, job: Job) -> Running:
    output = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(kit, job), stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=variables)
    return Running(process=process, output=output, started=time.perf_counter())


def command(kit: Kit, job: Job) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu.kit.trial_job", str(kit.device), *job]


def _name(job: Job) -> str:
    return f"trial with compilation: {' '.join(job)}"


def _end(kit: Kit, job: Job, ended: Running) -> None:
    with ended.output:
        result = ended.ended()
    told = {name: text for name, text in result.items() if text is not None}
    kit.tell(_name(job), time.perf_counter() - ended.started, "s", **told)
    if "fault" in result:
        leave_out([job[0]])


def leave_out(families: Iterable[str]) -> None:
    """Let the engines of this process do without the kernels of these families."""
    LEFT_OUT.update(families)
    for family in LEFT_OUT:
        module, function = TRIALS[family]
        setattr(import_module(module), function, lambda *_, family=family, **__: why_left_out(family))


def left_out() -> list[str]:
    return sorted(LEFT_OUT)


def why_left_out(family: str) -> str:
    return f"an earlier check of {family} made the device unusable or did not end"


def _choose(kit: Kit) -> None:
    started = time.perf_counter()
    chosen = choose_kernels(kit.device, torch.bfloat16)
    kit.tell("choice of kernels, with trials", time.perf_counter() - started, "s")
    for name in ("lora", "attention", "elementwise"):
        kit.tell(f"kernels for {name}", getattr(chosen, name), "text")
    for number, reason in enumerate(chosen.reasons, 1):
        kit.tell(f"reason {number} against a faster kernel", reason, "text")
