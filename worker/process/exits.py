"""How a trainer ended, from its exit status and the last lines it printed. Pure."""

from __future__ import annotations

import re

from catalog.states import EndReason
from worker.process.exit_status import own_error
from worker.process.parent_watch import LOST_PARENT
from worker.process.sandbox import REFUSAL, REFUSED

CUDA_OOM = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|torch\.OutOfMemoryError|_STATUS_ALLOC_FAILED", re.IGNORECASE
)
PYTHON_OOM = r"^(?:\[rank\d+\]: )?(?!torch\.)[\w.]*MemoryError\b"
"""Python's own, and NumPy's `numpy._core._exceptions._ArrayMemoryError`; torch's tells of the device."""
HOST_OOM = re.compile(rf"DefaultCPUAllocator: can't allocate memory|{PYTHON_OOM}|std::bad_alloc", re.MULTILINE)
KILLED = re.compile(r"died with <Signals\.SIGKILL: 9>|Signal 9 \(SIGKILL\) received by PID")
"""What accelerate's launcher prints of its child, and torchrun's of one of several."""
LOST = re.compile(rf"status {LOST_PARENT}\b|exitcode +: {LOST_PARENT}\b")
DISK_FULL = 114
"""Exit status of a trainer that could not write: it may have found no room to say so either."""
NO_ROOM = re.compile(
    rf"status {DISK_FULL}\b|exitcode +: {DISK_FULL}\b|^(?:\[rank\d+\]: )?.*OSError: \[Errno 28\]", re.MULTILINE
)
BROKEN = re.compile(r"\bBrokenPass: ")
"""Of the process that ran out, or of another that ended for it."""
DIFFER = re.compile(r"^(?:\[rank\d+\]: )?[\w.]*RanksDiffer: (.*)$", re.MULTILINE)
WAS_KILLED = "The trainer was killed (signal 9)."


def classify_exit(
    returncode: int, log_tail: str, *, num_oom_kills: int, device_kind: str, is_disk_full: bool = False
) -> tuple[EndReason, str]:
    """Why every job of that trainer ended, and a sentence.

    num_oom_kills: by the kernel, while it ran. device_kind: cpu or cuda. is_disk_full: the trainers', now.
    """
    killed = returncode in (-9, 137) or KILLED.search(log_tail) is not None
    if killed and num_oom_kills > 0:
        return EndReason.HOST_OOM, "The kernel killed the trainer for want of memory."
    shortage = _shortage(log_tail, device_kind)
    if shortage is not None:
        return shortage
    if killed:
        return EndReason.TRAINER_CRASHED, WAS_KILLED
    if returncode == LOST_PARENT or LOST.search(log_tail) is not None:
        return EndReason.INFRA_LOST, "The trainer heard nothing from its worker for a whole lease."
    return _of_node(returncode, log_tail, is_disk_full=is_disk_full) or _by_itself(returncode, log_tail)


def _of_node(returncode: int, log_tail: str, *, is_disk_full: bool) -> tuple[EndReason, str] | None:
    """What no job is to blame for."""
    if returncode == REFUSED:
        detail = log_tail.rpartition(REFUSAL)[2].partition("\n")[0]
        return EndReason.NODE_FAILED, f"The sandbox of the trainer could not be applied: {detail.strip()}"
    if returncode and (is_disk_full or returncode == DISK_FULL or NO_ROOM.search(log_tail) is not None):
        return EndReason.NODE_FAILED, "The worker's disk was full, and the trainer ended."
    return None


def _by_itself(returncode: int, log_tail: str) -> tuple[EndReason, str]:
    if (differ := DIFFER.search(log_tail)) is not None:
        return EndReason.NODE_FAILED, differ[1]
    if returncode == 0:
        return EndReason.TRAINER_CRASHED, "The trainer ended without finishing its jobs."
    detail = f"The trainer ended with exit status {returncode}. {own_error(log_tail) or ''}"
    return EndReason.TRAINER_CRASHED, detail.strip()


def _shortage(log_tail: str, device_kind: str) -> tuple[EndReason, str] | None:
    """Of the machine or of the GPU. On a CPU the trainer says torch.OutOfMemoryError as well."""
    if BROKEN.search(log_tail) is not None:
        return EndReason.DIVIDED_OOM, "Memory ran out amid a pass through the divided base, and the trainer ended."
    is_device_short = CUDA_OOM.search(log_tail) is not None
    if HOST_OOM.search(log_tail) or (is_device_short and device_kind == "cpu"):
        return EndReason.HOST_OOM, "The machine ran out of memory."
    return (EndReason.CUDA_OOM, "The GPU ran out of memory.") if is_device_short else None
