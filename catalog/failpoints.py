"""Faults on demand: FAILPOINT=NAME:ACTION makes this process fail where it passes that name.

ACTION is kill, hang, raise, exit (with status 0), wait=PATH (goes on once PATH exists), take=BYTES (of memory, for
good) or kill-if=PATH (takes PATH away and kills whoever found it: one process each time that it is made). Entries are
separated by commas; NAME@K is for process K of a trainer alone. Without the variable nothing happens.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

VARIABLE = "FAILPOINT"
"""Names in it: in the api submit_before_commit, submit_after_commit; in a worker before_claim, after_claim, uploading,
before_complete, in_complete, after_complete; in its trainer loading, step_K, in_checkpoint, verifying."""
_taken: list[bytes] = []


class Failure(RuntimeError):
    """Raised by a failpoint that says `raise`."""


def pass_by(name: str) -> None:
    """Fail here if the environment asks for it."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    for entry in wanted.split(","):
        place, _, action = entry.partition(":")
        place, _, rank = place.partition("@")
        if place == name and rank in ("", os.environ.get("RANK", "0")):
            _fail(name, action)


def folders() -> list[str]:
    """Of the files that failpoints of the environment delete (kill-if): a sandbox must let its process reach them."""
    actions = [entry.partition(":")[2].partition("=") for entry in os.environ.get(VARIABLE, "").split(",")]
    return [str(Path(path).absolute().parent) for verb, _, path in actions if verb == "kill-if"]


def _fail(name: str, action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "raise":
        raise Failure(f"failpoint {name}")
    if action == "exit":
        os._exit(0)
    verb, _, path = action.partition("=")
    if verb == "take":
        _taken.append(b"\1" * int(path))
        return
    if verb == "kill-if":
        _kill_if(Path(path))
        return
    known = "kill, kill-if=PATH, hang, raise, exit, wait=PATH, take=BYTES"
    assert verb in ("hang", "wait"), f"{VARIABLE}: {action!r} is none of {known}"
    while verb == "hang" or not Path(path).exists():
        time.sleep(0.02)


def _kill_if(path: Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
