"""When a worker gives up its trainer or its GPU.

A trainer is killed that loads too long, is silent while it is busy, or shuts down too slowly. Its stacks go into the
logs of its jobs first. A GPU is given up when its driver has reported nothing for SILENT_GPU_SECONDS.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress

from catalog.fleet import cordons
from catalog.states import EndReason
from worker.context.context import WorkerContext
from worker.node import devices
from worker.process import exit_status
from worker.process.launcher import TrainerProcess
from worker.session.session_job import End
from worker.session.trainer_session import TrainerSession

log = logging.getLogger(__name__)
TIMES_ITS_PACE = 4
"""So much longer than it ever was silent before, a slow trainer may be."""
SILENT_GPU_SECONDS = 300.0
"""For so long a driver may tell nothing of a GPU, as amid its own restart, before somebody has to look at it."""

LEFT_BEHIND = End(
    reason=EndReason.NODE_FAILED,
    detail="The trainer could not be killed: it waits in the kernel, for its device's driver or a disk that hangs.",
)
"""It writes nothing that counts, should it ever wake: its claims are others'."""


def watch_clock(
    context: WorkerContext, trainer: TrainerProcess, pack: TrainerSession, leaving_at: float | None
) -> None:
    """End a trainer that takes too long, with its stacks in its logs. leaving_at: when it was told to leave."""
    verdict = _verdict(context, trainer, pack, leaving_at)
    if verdict is None:
        return
    log.error("%s Trainer %s is ended.", verdict.detail, pack.trainer_id)
    pack.verdict = verdict
    with suppress(OSError):  # they are for people; it is ended all the same
        exit_status.dump_stacks(trainer, verdict.detail)
    trainer.kill()


def set_aside(context: WorkerContext, trainer: TrainerProcess) -> None:
    """Where its trainer is left behind, which holds its device still, the worker takes nothing new. Raises
    Unavailable."""
    if trainer.is_left_behind:
        log.error("%s", LEFT_BEHIND.detail)
        cordons.cordon_own(context.db, context.worker_id, reason=LEFT_BEHIND.detail)


def cordon_silent(context: WorkerContext) -> None:
    """At each look for jobs. With a GPU of which the driver tells nothing the worker takes none, so none can fail and
    show it: after a while of that the node is cordoned; and again, should somebody uncordon it as it is. Raises
    Unavailable."""
    why = devices.silence(context.device)
    if why is None:
        context.silent_since = None
        return
    now = time.monotonic()
    if context.silent_since is None:
        context.silent_since = now
    if now - context.silent_since < SILENT_GPU_SECONDS:
        return
    reason = f"For {SILENT_GPU_SECONDS / 60:.0f} minutes the driver has not told what is free of {why}."
    cordons.cordon_own(context.db, context.worker_id, reason=reason)
    log.error("%s The worker is cordoned.", reason)
    context.silent_since = now


def _verdict(
    context: WorkerContext, trainer: TrainerProcess, pack: TrainerSession, leaving_at: float | None
) -> End | None:
    now = time.monotonic()
    if leaving_at is not None and now - leaving_at > context.drain_seconds:
        detail = "The trainer did not save its jobs in time; the last checkpoints stand."
        return End(reason=EndReason.DRAINED, detail=detail)
    if pack.ready is None and now - trainer.started_at > context.load_seconds:
        detail = f"The base model was not loaded within {context.load_seconds:.0f} s."
        return End(reason=EndReason.TIMEOUT, detail=detail)
    if pack.ready is None or not len(pack):
        return None
    silent_seconds, allowed = pack.silent_seconds(), _allowed_seconds(context, pack)
    if silent_seconds <= allowed:
        return None
    what = "while it verified an adapter" if pack.is_verifying else ""
    return End(reason=EndReason.TIMEOUT, detail=f"The trainer said nothing for {allowed:.0f} s {what}".strip() + ".")


def _allowed_seconds(context: WorkerContext, pack: TrainerSession) -> float:
    """Of silence, by the trainer's own pace. Amid a verification it has no file to write and no kernel to compile."""
    least = min(context.verifying_seconds, context.progress_seconds) if pack.is_verifying else context.progress_seconds
    return max(least, TIMES_ITS_PACE * pack.longest_silence)
