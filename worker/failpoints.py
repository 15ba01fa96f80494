"""Faults on demand: FAILPOINT=NAME:kill|hang|raise makes this process fail where it passes that name.

Several are separated by commas. Without the variable, passing a failpoint is one dictionary look-up.
Names: after_claim, loading, step_K, in_checkpoint, uploading, before_complete, after_complete.
"""

from __future__ import annotations

import os
import signal
import time

VARIABLE = "FAILPOINT"


class Failure(RuntimeError):
    """Raised by a failpoint that says `raise`."""


def pass_by(name: str) -> None:
    """Fail here if the environment asks for it."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    for entry in wanted.split(","):
        place, _, action = entry.partition(":")
        if place == name:
            _fail(name, action)


def _fail(name: str, action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "raise":
        raise Failure(f"failpoint {name}")
    assert action == "hang", f"{VARIABLE}: {action!r} is none of kill, hang, raise"
    while True:
        time.sleep(3600)
