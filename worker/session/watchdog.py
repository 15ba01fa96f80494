"""Kills a trainer that hangs, and cordons a worker whose device is unusable.

A trainer is killed if it takes too long to load, sends no events while it is busy, or shuts down too slowly. Before
that, its stacks are written to the logs of its jobs. A worker is cordoned if its trainer can't be killed, or if a
GPU's driver has not reported the free memory for SILENT_GPU_SECONDS.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from pathlib import Path

from catalog.fleet import cordons
from catalog.states import EndReason
from worker.context.context import WorkerContext
from worker.node import devices
from worker.process import exit_status
from worker.process.launcher import TrainerProcess
from worker.session.failures import TrainerEnd
from worker.session.session_job import End
from worker.session.trainer_session import TrainerSession

log = logging.getLogger(__name__)
READ_BYTES_PER_SECOND = 50e6
"""Rate at which a slow disk or network file system delivers the files of a base model."""
PACE_FACTOR = 4
"""A slow trainer may be silent for this multiple of its longest silence so far."""
SILENT_GPU_SECONDS = 300.0
"""A driver may report nothing for this time, for example during its own restart. After that, an operator must check the
GPU."""


def watch_clock(
    context: WorkerContext, trainer: TrainerProcess, session: TrainerSession, closing_at: float | None
) -> None:
    """Kill a trainer that takes too long, with its stacks in its logs. closing_at: when it was first to shut down or
    unload, if it was."""
    timeout = _timeout(context, trainer, session, closing_at)
    if timeout is None:
        return
    log.error("%s Trainer %s is killed.", timeout.detail, session.trainer_id)
    session.outcome = timeout
    with suppress(OSError):  # the stacks help users; the trainer is killed with or without them
        exit_status.dump_stacks(trainer, timeout.detail)
    trainer.kill()


def cordon_if_unkillable(context: WorkerContext, trainer: TrainerProcess) -> None:
    """Cordon the worker if its trainer could not be killed, because that trainer still holds the device. Raises
    Unavailable."""
    if trainer.is_left_behind:
        reason = TrainerEnd.UNKILLABLE.value.detail
        log.error("%s", reason)
        cordons.cordon_own(context.db, context.worker_id, reason=reason)


def cordon_silent(context: WorkerContext) -> None:
    """Cordon a node whose GPU driver has been silent for too long. Called whenever the worker polls for jobs.

    While the driver does not report a GPU's memory, the worker claims no job, so no failing job would reveal the fault.
    If an operator uncordons the node without a fix, it is cordoned again. Raises Unavailable.
    """
    silent_gpu = devices.silence(context.device)
    if silent_gpu is None:
        context.silent_since = None
        return
    now = time.monotonic()
    if context.silent_since is None:
        context.silent_since = now
    if now - context.silent_since < SILENT_GPU_SECONDS:
        return
    reason = f"For {SILENT_GPU_SECONDS / 60:.0f} minutes the driver has not reported the free memory of {silent_gpu}."
    cordons.cordon_own(context.db, context.worker_id, reason=reason)
    log.error("%s The worker is cordoned.", reason)
    context.silent_since = now


def _timeout(
    context: WorkerContext, trainer: TrainerProcess, session: TrainerSession, closing_at: float | None
) -> End | None:
    """Return the time limit that the trainer has exceeded: to shut down, to load its base model, or between two
    events. None if it has exceeded none."""
    now = time.monotonic()
    if closing_at is not None and _is_saving_too_long(context, session, closing_at, now=now):
        return TrainerEnd.SLOW_SHUTDOWN.value
    if session.ready is None and now - trainer.started_at > context.load_seconds:
        allowed = context.load_seconds + _base_bytes(trainer) / READ_BYTES_PER_SECOND
        if now - trainer.started_at <= allowed:
            return None
        return End(reason=EndReason.TIMEOUT, detail=f"The base model was not loaded within {allowed:.0f} s.")
    if session.ready is None or session.is_empty:
        return None
    silent_seconds, allowed = session.silent_seconds(), _allowed_seconds(context, session)
    if silent_seconds <= allowed:
        return None
    what = "while it verified an adapter" if session.is_verifying else ""
    return End(reason=EndReason.TIMEOUT, detail=f"The trainer sent no events for {allowed:.0f} s {what}".strip() + ".")


def _is_saving_too_long(context: WorkerContext, session: TrainerSession, closing_at: float, *, now: float) -> bool:
    """Return whether it needs too long for one job, of which each causes an event, or for all."""
    last_saved_at = max(closing_at, session.last_event_at)
    return now - last_saved_at > context.drain_seconds or now - closing_at > context.drain_limit_seconds


def _base_bytes(trainer: TrainerProcess) -> int:
    """Return the size of the base model's files. 0 if they can't be read."""
    try:
        return sum(path.stat().st_size for path in Path(trainer.directory.settings()["base_dir"]).iterdir())
    except OSError:
        return 0


def _allowed_seconds(context: WorkerContext, session: TrainerSession) -> float:
    """Return how long the trainer may send no events, by its own pace. During a verification it writes no files and
    compiles no kernels, so the limit is lower."""
    least = (
        min(context.verifying_seconds, context.progress_seconds) if session.is_verifying else context.progress_seconds
    )
    return max(least, PACE_FACTOR * session.longest_silence)
