"""The stages in their order, each with a deadline. A stage that fails is a result, and the next one runs.

A stage that ends or blocks the process is left to supervision.py.
"""

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
from benchmarks.gpu.kit.supervision import GRACE_SECONDS, LEAST_SECONDS, Progress


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


def run_stages(folder: Path, names: list[str], *, progress: Progress, quick: bool) -> None:
    """Run the stages until `progress.ends`. They share the time that is left now, after the imports.

    Returns early if the device refuses further work. `progress` then has the stages of another process.
    """
    kit = Kit(
        log=Log(folder, started=progress.started),
        sizes=sizes.quick() if quick else sizes.full(),
        matrix_flops=progress.matrix_flops,
        progress=progress,
    )
    if quick:
        torch.set_num_threads(1)
    compilation.leave_out(progress.left_out)
    gc.freeze()  # what is imported stays, and a collection between two measurements need not visit it
    stack = 2 if progress.stack is None else os.open(progress.stack, os.O_CREAT | os.O_WRONLY)
    begun, whole, elapsed = time.monotonic(), sum(STAGES[name].share for name in names), 0.0
    for index, name in enumerate(names):
        elapsed += STAGES[name].share
        until = max(begun + (progress.ends - begun) * elapsed / whole, time.monotonic() + LEAST_SECONDS)
        note_start(kit, name, names[index + 1 :], until=until)
        faulthandler.dump_traceback_later(until + GRACE_SECONDS - time.monotonic(), exit=True, file=stack)
        run_stage(kit, name, STAGES[name].run, until=until)
        is_whole = not (kit.on_gpu and is_broken(kit))
        if is_whole:
            kit.detach()
        note_end(kit, is_whole=is_whole)
        if not is_whole:
            break
    faulthandler.cancel_dump_traceback_later()


def note_start(kit: Kit, name: str, following: list[str], *, until: float) -> None:
    """Write what another process needs if the stage ends or blocks this one."""
    progress = kit.progress
    progress.stage, progress.names, progress.suspect, progress.until = name, following, "", until
    progress.write()


def note_end(kit: Kit, *, is_whole: bool) -> None:
    """Write what another process needs after a stage. Without the kernels that broke the device, it runs again."""
    progress = kit.progress
    progress.left_out, progress.matrix_flops = compilation.left_out(), kit.matrix_flops
    if not is_whole:
        if progress.suspect:
            progress.names = [progress.stage, *(progress.names or [])]
        progress.leave_out_suspect()
    progress.stage, progress.until = "", progress.ends if is_whole else time.monotonic()
    progress.write()


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
