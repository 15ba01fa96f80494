"""Whether one node's processes of a trainer ended by themselves, or for another node's: by what each printed. Pure.

A process that fails tells the others (lora_core.distributed.failure_broadcast), and they print that as well. A killed
process can't, and then the others print that they have lost it. So a node is its own cause where any of its processes
ended otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
class Heard:
    """What the processes of one node tell."""

    is_own: bool
    """One of them ended by itself."""
    is_echo: bool
    """None did, and they tell of others. Neither is true where they tell nothing."""
    said: str = ""
    """Of an echo: in what words."""
    is_told: bool = False
    """By the process that failed first, so all had met by then."""


def heard(logs: Sequence[str], *, ranks: range, returncode: int | None) -> Heard:
    """logs: the last lines of each of the node's processes, whose numbers in the trainer are `ranks`. returncode: of
    the node's trainer; None where its worker has killed it, so that only words count."""
    if _crashed(logs, returncode):
        return Heard(is_own=True, is_echo=False)
    fellows = [match for log in logs for match in FELLOW.finditer(log)]
    if fellows:
        rank, said = int(fellows[-1][1]), fellows[-1][2]
        is_own = rank in ranks and not _is_of_another(said)
        told = "" if is_own else f"Rank {rank} failed: {said}"
        return Heard(is_own=is_own, is_echo=not is_own, said=told, is_told=True)
    errors = [error for log in logs if (error := last_error(log)) is not None]
    own = [error for error in errors if not _is_of_another(error)]
    if own or not errors:
        return Heard(is_own=bool(own) or returncode is not None, is_echo=False)
    return Heard(is_own=False, is_echo=True, said=errors[-1])


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
