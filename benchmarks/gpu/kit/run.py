"""The stages in their order, each with a deadline. A stage that fails is a result, and the next one runs."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.kit import (
    ablations,
    comparisons,
    compilation,
    facts,
    kernels,
    profiles,
    properties,
    sizes,
    stalls,
)
from benchmarks.gpu.kit.kit import Kit, StageOver
from benchmarks.gpu.kit.log import Log

GRACE_SECONDS = 20
"""Time after the limit until the process ends, if a call to the device does not return."""
LEAST_SECONDS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """`share` is the stage's part of the time limit, in seconds of 480. Time that is left goes to the next stages."""

    run: Callable[[Kit], None]
    share: float


STAGES = {
    "facts": Stage(run=facts.facts, share=15),
    "compilation": Stage(run=compilation.compilation, share=45),
    "kernels": Stage(run=kernels.kernels, share=45),
    "properties": Stage(run=properties.properties, share=80),
    "profile_small": Stage(run=profiles.small, share=35),
    "profile_large": Stage(run=profiles.large, share=45),
    "compare_small": Stage(run=comparisons.small, share=65),
    "compare_large": Stage(run=comparisons.large, share=75),
    "ablations": Stage(run=ablations.ablations, share=50),
    "stalls": Stage(run=stalls.stalls, share=25),
}


def has_gpu() -> bool:
    return torch.cuda.is_available()


def run_stages(folder: Path, *, names: list[str], seconds: float, started: float, quick: bool) -> None:
    """Run the stages until `seconds` after `started`, a time of the monotonic clock."""
    kit = Kit(log=Log(folder, started=started), sizes=sizes.quick() if quick else sizes.full())
    if quick:
        torch.set_num_threads(1)
    compilation.leave_out(())  # what faulted in the process that this one replaces
    gc.freeze()  # what is imported stays, and a collection between two measurements need not visit it
    faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True)
    whole, elapsed = sum(STAGES[name].share for name in names), 0.0
    for index, name in enumerate(names):
        elapsed += STAGES[name].share
        run_stage(kit, name, STAGES[name].run, until=started + seconds * elapsed / whole)
        if kit.on_gpu and is_broken(kit):
            restart(folder, names[index + 1 :], seconds=started + seconds - time.monotonic())
            return
        kit.detach()
    faulthandler.cancel_dump_traceback_later()


def run_stage(kit: Kit, name: str, stage: Callable[[Kit], None], *, until: float) -> None:
    """Run a stage until a time of the monotonic clock. Records how it ended, and rewrites the page."""
    kit.stage = name
    began = time.monotonic()
    details: dict[str, str] = {}
    try:
        with deadline(until - began):
            stage(kit)
        status = "complete"
    except StageOver:
        status = "stopped at its deadline"
        details["traceback"] = traceback.format_exc()
    except Exception as error:  # noqa: BLE001 - whatever a stage raises is a result
        status = f"failed: {type(error).__name__}"
        details["traceback"] = traceback.format_exc()
    kit.tell("stage", status, "text", took_seconds=time.monotonic() - began, **details)
    kit.log.write_page()
    sys.stdout.write(f"{name}: {status}\n")
    sys.stdout.flush()


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise StageOver in the block after `seconds`, when the interpreter next runs."""

    def over(*_: object) -> None:
        raise StageOver

    previous = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(LEAST_SECONDS, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def is_broken(kit: Kit) -> bool:
    """Return whether the device refuses all further work of this process, as after an illegal access to memory."""
    try:
        kit.synchronize()
    except RuntimeError as error:
        kit.tell("device", "refuses further work of the process", "text", error=str(error).partition("\n")[0])
        kit.log.write_page()
        return True
    return False


def restart(folder: Path, names: list[str], *, seconds: float) -> None:
    """Replace this process by one that runs the remaining stages, if time is left."""
    if names and seconds > LEAST_SECONDS:
        options = ["--out", str(folder), "--seconds", str(seconds), "--only", *names]
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu.kit", *options])
