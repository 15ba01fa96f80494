"""Injects faults for tests: FAILPOINT=NAME:ACTION makes the process fail at the failpoint NAME.

Actions:
- kill, hang, raise, exit (with status 0).
- wait=PATH: wait until PATH exists.
- take=BYTES: allocate memory and never free it.
- kill-if=PATH: delete PATH, and kill the process that deleted it. Each time that the file is created, it kills one
  process.

Commas separate entries. NAME@K applies to process K of a trainer only. Without the variable, failpoints do nothing.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

VARIABLE = "FAILPOINT"
"""Failpoints in the API server: submit_before_commit, submit_after_commit. In a worker: before_claim, after_claim,
uploading, before_complete, in_complete, after_complete, before_export_finishes. In its trainer: loading, step_K,
in_checkpoint, verifying. In the process that writes an export: exporting."""
_reserved: list[bytes] = []


class Failure(RuntimeError):
    """Raised by a failpoint with the action `raise`."""


def pass_by(name: str) -> None:
    """Run the actions that the environment sets for this failpoint."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    for entry in wanted.split(","):
        place, _, action = entry.partition(":")
        place, _, rank = place.partition("@")
        if place == name and rank in ("", os.environ.get("RANK", "0")):
            _fail(name, action)


def folders() -> list[str]:
    """Return the folders of the files that kill-if deletes: a sandbox must give its process access to them."""
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
        _reserved.append(b"\1" * int(path))
        return
    if verb == "kill-if":
        _kill_if(Path(path))
        return
    known = "kill, kill-if=PATH, hang, raise, exit, wait=PATH, take=BYTES"
    assert verb in ("hang", "wait"), f"{VARIABLE}: {action!r} is not one of {known}"
    while verb == "hang" or not Path(path).exists():
        time.sleep(0.02)


def _kill_if(path: Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
