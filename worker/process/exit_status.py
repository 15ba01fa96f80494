"""Whether one node's processes of a trainer ended by themselves, or for another node's: by what each printed. Pure.

A process that fails tells the others (lora_core.distributed.failure_broadcast), and they print that as well. A killed
process can't, and then the others print that they have lost it. So a node is its own cause where any of its processes
ended otherwise.
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

FELLOW = re.compile(r"^(?:\[rank\d+\]: )?[\w.]*FellowFailure: Rank (\d+) failed: (.*)$", re.MULTILINE)
ERROR = re.compile(
    r"^(?:\[rank\d+\]: )?((?:[\w.]*(?:Error|Exception|Failure)|  what\(\)):.*|[\w.]*Error)$", re.MULTILINE
)
"""A line that names an exception, of Python or of C++."""
ECHO = re.compile(
    r"gloo|Dist(?:Backend|Network|Store)Error|NCCL error|nccl(?:Remote|System|Internal)Error|Watchdog caught collective"
    r"|Connection (?:closed|reset)|Broken pipe|(?:Socket|[Ww]ait) timeout|does not listen",
    re.IGNORECASE,
)
"""Of a process that has lost another one."""
SICK = re.compile(r"CUDA error|unhandled cuda error|ncclUnhandledCudaError|out of memory", re.IGNORECASE)
"""Of one whose own device has failed, whoever tells it."""
SIGNAL = re.compile(r"Signal (\d+) \(SIG\w+\) received by PID|died with <Signals\.SIG\w+: (\d+)>|exitcode +: (-?\d+)")
"""What launchers print of their children."""
CRASHED = re.compile(r"^Fatal Python error: (?!Aborted)", re.MULTILINE)
NEUTRAL = frozenset({0, 1, 2, 6, 15})
"""Signals and exit statuses that follow from others' ends too: libraries abort, launchers terminate."""
OF_LAUNCHERS = ("CalledProcessError", "ChildFailedError")


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerFailure:
    """What the processes of one node tell."""

    is_own: bool
    """One of them ended by itself."""
    is_echo: bool
    """None did, and they tell of others. Neither is true where they tell nothing."""
    said: str = ""
    """Of an echo: in what words."""
    is_reported: bool = False
    """By the process that failed first, so all had met by then."""


def heard(logs: Sequence[str], *, ranks: range, returncode: int | None) -> PeerFailure:
    """logs: the last lines of each of the node's processes, whose numbers in the trainer are `ranks`. returncode: of
    the node's trainer; None where its worker has killed it, so that only words count."""
    if _crashed(logs, returncode):
        return PeerFailure(is_own=True, is_echo=False)
    fellows = [match for log in logs for match in FELLOW.finditer(log)]
    if fellows:
        rank, said = int(fellows[-1][1]), fellows[-1][2]
        is_own = rank in ranks and not _is_of_another(said)
        detail = "" if is_own else f"Rank {rank} failed: {said}"
        return PeerFailure(is_own=is_own, is_echo=not is_own, said=detail, is_reported=True)
    errors = [error for log in logs if (error := last_error(log)) is not None]
    own = [error for error in errors if not _is_of_another(error)]
    if own or not errors:
        return PeerFailure(is_own=bool(own) or returncode is not None, is_echo=False)
    return PeerFailure(is_own=False, is_echo=True, said=errors[-1])


def last_error(log: str) -> str | None:
    """The last line that names an exception of the trainer itself, not of its launcher."""
    found = _errors(log)
    return found[-1] if found else None


def own_error(log: str) -> str | None:
    """The same, but for those of lost processes where there is another."""
    found = _errors(log)
    own = [error for error in found if not _is_of_another(error)]
    return (own or found)[-1] if found else None


def without_others(log: str, ranks: range) -> str:
    """The log but for what it tells of failures on other nodes."""
    return FELLOW.sub(lambda match: match[0] if int(match[1]) in ranks else "", log)


def _errors(log: str) -> list[str]:
    named = [line.strip()[:500] for line in ERROR.findall(log)]
    return [line for line in named if not any(name in line for name in OF_LAUNCHERS)]


def _crashed(logs: Sequence[str], returncode: int | None) -> bool:
    statuses = [abs(returncode or 0), *(number for log in logs for number in _statuses(log))]
    return any(status not in NEUTRAL for status in statuses) or any(CRASHED.search(log) for log in logs)


def _statuses(log: str) -> Iterator[int]:
    """Of signals and exits, their signs left out: a child that was killed has the signal's number below zero."""
    for match in SIGNAL.finditer(log):
        yield abs(int(next(found for found in match.groups() if found is not None)))


def _is_of_another(error: str) -> bool:
    return ECHO.search(error) is not None and SICK.search(error) is None


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
        return EndReason.SHARDED_OOM, "Memory ran out amid a pass through the divided base, and the trainer ended."
    is_device_short = CUDA_OOM.search(log_tail) is not None
    if HOST_OOM.search(log_tail) or (is_device_short and device_kind == "cpu"):
        return EndReason.HOST_OOM, "The machine ran out of memory."
    return (EndReason.CUDA_OOM, "The GPU ran out of memory.") if is_device_short else None


DUMP_SECONDS = 3.0
"""For all processes together. One that is stopped, or waits for a disk, doesn't answer."""
POLL_SECONDS = 0.1


def dump_stacks(trainer: TrainerProcess, why: str) -> None:
    """`why`, and the stacks of every thread, into the logs of all processes; it takes ANSWER_SECONDS at most."""
    asked = [pid for pid in trainer.pids() if _handles_signal(pid)]
    if not asked:
        return
    paths = list(trainer.directory.logs().values())
    for path in paths:
        _append_text(path, f"{why} Its threads stand here:\n")
    before = _log_sizes(paths)
    for pid in asked:
        with suppress(ProcessLookupError):
            os.kill(pid, ASKED_BY)
    _wait_for_growth(paths, before, num_answers=len(asked))


def _handles_signal(pid: int) -> bool:
    """Whether it has a handler for the signal: whoever has none yet, or is a launcher, would end by it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has gone; or this is no Linux, and nothing can be known
        return False
    caught = next((line for line in status.splitlines() if line.startswith("SigCgt:")), "SigCgt: 0")
    return bool(int(caught.split()[1], 16) >> (ASKED_BY - 1) & 1)


def _wait_for_growth(paths: list[Path], before: dict[Path, int], *, num_answers: int) -> None:
    """Until so many logs have grown and none grows any more."""
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
    """A full disk is no reason not to ask."""
    with suppress(OSError), os.fdopen(open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as file:
        file.write(text.encode())
