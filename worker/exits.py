"""How a trainer ended, from its exit status and the last lines it printed. Pure."""

from __future__ import annotations

import re

from catalog.states import EndReason
from worker.tether import LOST_PARENT

CUDA_OOM = re.compile(r"CUDA out of memory|torch\.OutOfMemoryError|CUDNN_STATUS_ALLOC_FAILED", re.IGNORECASE)
HOST_OOM = re.compile(r"DefaultCPUAllocator: can't allocate memory|^MemoryError\b|std::bad_alloc", re.MULTILINE)
KILLED = re.compile(r"died with <Signals\.SIGKILL: 9>")
"""What accelerate's launcher prints of its child."""


def classify_exit(returncode: int, log_tail: str, *, num_oom_kills: int) -> tuple[EndReason, str]:
    """Why every job of that trainer ended, and a sentence. num_oom_kills: by the kernel, while it ran."""
    killed = returncode in (-9, 137) or KILLED.search(log_tail) is not None
    if HOST_OOM.search(log_tail) or (killed and num_oom_kills > 0):
        by_kernel = "The kernel killed the trainer for want of memory."
        return EndReason.HOST_OOM, by_kernel if killed else "The machine ran out of memory."
    if CUDA_OOM.search(log_tail):
        return EndReason.CUDA_OOM, "The GPU ran out of memory."
    if killed:
        return EndReason.TRAINER_CRASHED, "The trainer was killed (signal 9)."
    if returncode == LOST_PARENT or f"status {LOST_PARENT}" in log_tail:
        return EndReason.INFRA_LOST, "The trainer heard nothing from its worker for a whole lease."
    if returncode == 0:
        return EndReason.TRAINER_CRASHED, "The trainer ended without finishing its jobs."
    return EndReason.TRAINER_CRASHED, f"The trainer ended with exit status {returncode}.{_last_error(log_tail)}"


def _last_error(log_tail: str) -> str:
    """The last line that names an exception of the trainer itself, not of its launcher."""
    named = re.findall(r"^[\w.]*(?:Error|Exception|Failure)\b.*$", log_tail, re.MULTILINE)
    own = [line for line in named if "CalledProcessError" not in line]
    return f" {own[-1][:500]}" if own else ""
