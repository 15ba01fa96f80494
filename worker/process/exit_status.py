"""Determines why a trainer exited, from its exit status and from the log of each of its processes.

With several nodes, it separates root causes from cascading failures. A process that fails notifies the others
(lora_core.distributed.failure_broadcast), and they print its error as well. A killed process can't notify them, so the
others print that they have lost the connection. A node is a root cause if any of its processes exited for another
reason.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from catalog.states import EndReason
from lorry.local.parent_watch import LOST_PARENT
from worker.process.launcher import TrainerProcess
from worker.process.sandbox import REFUSAL, REFUSED
from worker.protocol.errors import ASKED_BY
from worker.protocol.trainer_paths import open_file

PEER = re.compile(r"^(?:\[rank\d+\]: )?[\w.]*FellowFailure: Rank (\d+) failed: (.*)$", re.MULTILINE)
ERROR = re.compile(
    r"^(?:\[rank\d+\]: )?((?:[\w.]*(?:Error|Exception|Failure)|  what\(\)):.*|[\w.]*Error)$", re.MULTILINE
)
"""A line that names an exception, of Python or of C++."""
CONNECTION_LOST = re.compile(
    r"gloo|Dist(?:Backend|Network|Store)Error|NCCL error|nccl(?:Remote|System|Internal)Error|Watchdog caught collective"
    r"|Connection (?:closed|reset)|Broken pipe|(?:Socket|[Ww]ait) timeout|does not listen",
    re.IGNORECASE,
)
"""Matches the errors of a process that has lost the connection to another one."""
DEVICE_FAILED = re.compile(r"CUDA error|unhandled cuda error|ncclUnhandledCudaError|out of memory", re.IGNORECASE)
"""Matches the failure of a process's own device, even if the same line matches CONNECTION_LOST."""
SIGNAL = re.compile(r"Signal (\d+) \(SIG\w+\) received by PID|died with <Signals\.SIG\w+: (\d+)>|exitcode +: (-?\d+)")
"""Matches the lines in which launchers report how their child processes exited."""
CRASHED = re.compile(r"^Fatal Python error: (?!Aborted)", re.MULTILINE)
NEUTRAL = frozenset({0, 1, 2, 6, 15})
"""Signals and exit statuses that can also follow from the exit of another process: libraries abort, and launchers
terminate their child processes."""
LAUNCHER_ERRORS = ("CalledProcessError", "ChildFailedError")


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerFailure:
    """The cause of a failure, as the processes of one node see it."""

    is_own: bool
    """The failure began on this node."""
    is_echo: bool
    """The failure began on another node. Both flags are False if the logs don't show where it began."""
    error: str = ""
    """The error that the processes report, if it began on another node."""
    is_reported: bool = False
    """The process that failed first reported the failure, so the processes of all nodes had connected by then."""


def peer_failure(logs: Sequence[str], *, ranks: range, returncode: int | None) -> PeerFailure:
    """Return where a failure began, from the logs of one node.

    logs: the last lines of each of the node's processes. ranks: their numbers in the trainer. returncode: the exit
    status of the node's trainer. None if the node's worker killed it, so that only the logs count.
    """
    if _crashed(logs, returncode):
        return PeerFailure(is_own=True, is_echo=False)
    peers = [match for log in logs for match in PEER.finditer(log)]
    if peers:
        rank, message = int(peers[-1][1]), peers[-1][2]
        is_own = rank in ranks and not _is_lost_connection(message)
        detail = "" if is_own else f"Rank {rank} failed: {message}"
        return PeerFailure(is_own=is_own, is_echo=not is_own, error=detail, is_reported=True)
    errors = [error for log in logs if (error := last_error(log)) is not None]
    own = [error for error in errors if not _is_lost_connection(error)]
    if own or not errors:
        return PeerFailure(is_own=bool(own) or returncode is not None, is_echo=False)
    return PeerFailure(is_own=False, is_echo=True, error=errors[-1])


def last_error(log: str) -> str | None:
    """Return the last line that names an exception of the trainer itself, not of its launcher."""
    found = _errors(log)
    return found[-1] if found else None


def own_error(log: str) -> str | None:
    """Return the last line that names an exception of this node, or else the last one about a lost process."""
    found = _errors(log)
    own = [error for error in found if not _is_lost_connection(error)]
    return (own or found)[-1] if found else None


def without_peer_failures(log: str, ranks: range) -> str:
    """Return the log without its reports of failures on other nodes."""
    return PEER.sub(lambda match: match[0] if int(match[1]) in ranks else "", log)


def _errors(log: str) -> list[str]:
    named = [line.strip()[:500] for line in ERROR.findall(log)]
    return [line for line in named if not any(name in line for name in LAUNCHER_ERRORS)]


def _crashed(logs: Sequence[str], returncode: int | None) -> bool:
    statuses = [abs(returncode or 0), *(number for log in logs for number in _statuses(log))]
    return any(status not in NEUTRAL for status in statuses) or any(CRASHED.search(log) for log in logs)


def _statuses(log: str) -> Iterator[int]:
    """Yield the numbers of the signals and exit statuses that launchers report. A negative number is a signal too, so
    signs are dropped."""
    for match in SIGNAL.finditer(log):
        yield abs(int(next(found for found in match.groups() if found is not None)))


def _is_lost_connection(error: str) -> bool:
    return CONNECTION_LOST.search(error) is not None and DEVICE_FAILED.search(error) is None


CUDA_OOM = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|torch\.OutOfMemoryError|_STATUS_ALLOC_FAILED", re.IGNORECASE
)
PYTHON_OOM = r"^(?:\[rank\d+\]: )?(?!torch\.)[\w.]*MemoryError\b"
"""Matches Python's own error and NumPy's `numpy._core._exceptions._ArrayMemoryError`. It excludes torch's error,
which is about the device."""
HOST_OOM = re.compile(rf"DefaultCPUAllocator: can't allocate memory|{PYTHON_OOM}|std::bad_alloc", re.MULTILINE)
KILLED = re.compile(r"died with <Signals\.SIGKILL: 9>|Signal 9 \(SIGKILL\) received by PID")
"""Matches the reports of accelerate's launcher about its only child process, and of torchrun about one of several."""
LOST = re.compile(rf"status {LOST_PARENT}\b|exitcode +: {LOST_PARENT}\b")
DISK_FULL = 114
"""Exit status of a trainer that could not write. It may have been unable to write an error message as well."""
NO_ROOM = re.compile(
    rf"status {DISK_FULL}\b|exitcode +: {DISK_FULL}\b|^(?:\[rank\d+\]: )?.*OSError: \[Errno 28\]", re.MULTILINE
)
BROKEN = re.compile(r"\bBrokenPass: ")
"""Printed by the process that ran out of memory, or by another one that exited because of it."""
DIFFER = re.compile(r"^(?:\[rank\d+\]: )?[\w.]*RanksDiffer: (.*)$", re.MULTILINE)
WAS_KILLED = "The trainer was killed (signal 9)."


def classify_exit(
    returncode: int, log_tail: str, *, num_oom_kills: int, device_kind: str, is_disk_full: bool = False
) -> tuple[EndReason, str]:
    """Return the reason for which the attempts of all jobs of the trainer ended, and a sentence about it.

    num_oom_kills: processes that the kernel killed while the trainer ran. device_kind: cpu or cuda. is_disk_full:
    whether the disk with the trainer's directory is full now.
    """
    killed = returncode in (-9, 137) or KILLED.search(log_tail) is not None
    if killed and num_oom_kills > 0:
        return EndReason.HOST_OOM, "The kernel killed the trainer because the machine ran out of memory."
    shortage = _shortage(log_tail, device_kind)
    if shortage is not None:
        return shortage
    if killed:
        return EndReason.TRAINER_CRASHED, WAS_KILLED
    if returncode == LOST_PARENT or LOST.search(log_tail) is not None:
        return EndReason.INFRA_LOST, "The trainer received no heartbeat from its worker for a whole lease."
    return _of_node(returncode, log_tail, is_disk_full=is_disk_full) or _own_exit(returncode, log_tail)


def _of_node(returncode: int, log_tail: str, *, is_disk_full: bool) -> tuple[EndReason, str] | None:
    """Return a failure that the node caused and not a job; None if it is another failure."""
    if returncode == REFUSED:
        detail = log_tail.rpartition(REFUSAL)[2].partition("\n")[0]
        return EndReason.NODE_FAILED, f"The sandbox of the trainer could not be applied: {detail.strip()}"
    if returncode and (is_disk_full or returncode == DISK_FULL or NO_ROOM.search(log_tail) is not None):
        return EndReason.NODE_FAILED, "The trainer exited because the worker's disk was full."
    return None


def _own_exit(returncode: int, log_tail: str) -> tuple[EndReason, str]:
    if (differ := DIFFER.search(log_tail)) is not None:
        return EndReason.NODE_FAILED, differ[1]
    if returncode == 0:
        return EndReason.TRAINER_CRASHED, "The trainer exited before it finished its jobs."
    detail = f"The trainer exited with status {returncode}. {own_error(log_tail) or ''}"
    return EndReason.TRAINER_CRASHED, detail.strip()


def _shortage(log_tail: str, device_kind: str) -> tuple[EndReason, str] | None:
    """Return which memory ran out: the machine's or the GPU's. torch raises OutOfMemoryError on a CPU, too."""
    if BROKEN.search(log_tail) is not None:
        return EndReason.SHARDED_OOM, "The trainer exited: memory ran out during a pass through the sharded base model."
    is_device_short = CUDA_OOM.search(log_tail) is not None
    if HOST_OOM.search(log_tail) or (is_device_short and device_kind == "cpu"):
        return EndReason.HOST_OOM, "The machine ran out of memory."
    return (EndReason.CUDA_OOM, "The GPU ran out of memory.") if is_device_short else None


DUMP_SECONDS = 3.0
"""Time limit for all processes together. A process that is stopped, or that waits for a disk, doesn't answer."""
POLL_SECONDS = 0.1


def dump_stacks(trainer: TrainerProcess, reason: str) -> None:
    """Append `reason` and the stacks of every thread to the logs of all processes. Waits at most DUMP_SECONDS."""
    signaled = [pid for pid in trainer.pids() if _handles_signal(pid)]
    if not signaled:
        return
    paths = list(trainer.directory.logs().values())
    for path in paths:
        _append_text(path, f"{reason} Stacks of its threads:\n")
    before = _log_sizes(paths)
    for pid in signaled:
        with suppress(ProcessLookupError):
            os.kill(pid, ASKED_BY)
    _wait_for_growth(paths, before, num_answers=len(signaled))


def _handles_signal(pid: int) -> bool:
    """Return whether the process handles the signal. The signal would kill a launcher, or a process that has not
    registered its handler yet."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # the process has exited, or this is not Linux
        return False
    mask_line = next((line for line in status.splitlines() if line.startswith("SigCgt:")), "SigCgt: 0")
    return bool(int(mask_line.split()[1], 16) >> (ASKED_BY - 1) & 1)


def _wait_for_growth(paths: list[Path], before: dict[Path, int], *, num_answers: int) -> None:
    """Wait until `num_answers` logs have grown and none grows any more, at most DUMP_SECONDS."""
    deadline = time.monotonic() + DUMP_SECONDS
    seen = before
    while time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        now = _log_sizes(paths)
        num_grown = sum(now[path] > before[path] for path in paths)
        if now == seen and num_grown >= min(num_answers, len(paths)):
            return
        seen = now


def _log_sizes(paths: Iterable[Path]) -> dict[Path, int]:
    return {path: path.stat().st_size if path.exists() else 0 for path in paths}


def _append_text(path: Path, text: str) -> None:
    """Append to a log if possible. If the disk is full, the stacks are requested without the text."""
    with suppress(OSError), os.fdopen(open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as file:
        file.write(text.encode())
