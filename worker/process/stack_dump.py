"""What a worker asks of a trainer that it is about to end for saying nothing: where each thread of it stands.

Every process of it answers into its own log (worker/protocol/rank_logs.py), by a handler in C: one that waits in a
collective or in a kernel answers too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from worker.process.launcher import TrainerProcess
from worker.protocol.rank_logs import ASKED_BY
from worker.protocol.trainer_paths import open_file

ANSWER_SECONDS = 3.0
"""For all processes together. One that is stopped, or waits for a disk, doesn't answer."""
LOOK_SECONDS = 0.1


def ask(trainer: TrainerProcess, why: str) -> None:
    """`why`, and the stacks of every thread, into the logs of all processes; it takes ANSWER_SECONDS at most."""
    asked = [pid for pid in trainer.pids() if _answers(pid)]
    if not asked:
        return
    paths = list(trainer.directory.logs().values())
    for path in paths:
        _append(path, f"{why} Its threads stand here:\n")
    before = _sizes(paths)
    for pid in asked:
        with suppress(ProcessLookupError):
            os.kill(pid, ASKED_BY)
    _wait(paths, before, num_answers=len(asked))


def _answers(pid: int) -> bool:
    """Whether it has a handler for the signal: whoever has none yet, or is a launcher, would end by it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has gone; or this is no Linux, and nothing can be known
        return False
    caught = next((line for line in status.splitlines() if line.startswith("SigCgt:")), "SigCgt: 0")
    return bool(int(caught.split()[1], 16) >> (ASKED_BY - 1) & 1)


def _wait(paths: list[Path], before: dict[Path, int], *, num_answers: int) -> None:
    """Until so many logs have grown and none grows any more."""
    deadline = time.monotonic() + ANSWER_SECONDS
    seen = before
    while time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
        now = _sizes(paths)
        num_grown = sum(now[path] > before[path] for path in paths)
        if now == seen and num_grown >= min(num_answers, len(paths)):
            return
        seen = now


def _sizes(paths: Iterable[Path]) -> dict[Path, int]:
    return {path: path.stat().st_size if path.exists() else 0 for path in paths}


def _append(path: Path, text: str) -> None:
    """A full disk is no reason not to ask."""
    with suppress(OSError), os.fdopen(open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as file:
        file.write(text.encode())
