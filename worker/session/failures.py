"""Maps the causes for which a trainer ends to the ends of its jobs' attempts.

`TrainerEnd` lists the causes that are neither an error nor an exit. The functions below it turn an exit status or an
error into an `End`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import Enum

from catalog.errors import LorryError, NotFound, OutOfSpace, Unavailable
from catalog.fleet.gangs import NotGathered
from catalog.states import EndReason
from worker.background.child_task import Abandoned, AttemptFailed
from worker.background.tokenization import FileRefused
from worker.context.context import WorkerContext
from worker.node import cgroup, devices
from worker.process.exit_status import DIFFER, classify_exit, peer_failure, without_peer_failures
from worker.process.launcher import TrainerProcess
from worker.protocol.errors import without_handled
from worker.protocol.mailbox import MalformedEvent
from worker.protocol.trainer_paths import UnsafePath
from worker.session.session_job import End

log = logging.getLogger(__name__)
LOG_BYTES = 16_000
"""Bytes that are read from the end of each process's log."""


class TrainerEnd(Enum):
    """Causes that end a trainer or prevent its launch, each with the end of its jobs' attempts."""

    WORKER_SHUTDOWN = End(reason=EndReason.DRAINED, detail="The worker shut down.")
    GANG_SHUTDOWN = End(reason=EndReason.DRAINED, detail="The worker, or another worker of its gang, shut down.")
    NOT_LAUNCHED = End(reason=EndReason.DRAINED, detail="The worker shut down before the job started.")
    UNWANTED = End(reason=EndReason.DRAINED, detail="The trainer was no longer needed.")
    SLOW_SHUTDOWN = End(
        reason=EndReason.DRAINED, detail="The trainer did not save its jobs in time; their last checkpoints are kept."
    )
    EMPTY = End(reason=EndReason.INFRA_LOST, detail="The trainer held no job.")
    """No attempt remains to be ended."""
    DATABASE_UNREACHABLE = End(reason=EndReason.INFRA_LOST, detail="The worker could not reach the database.")
    UNKILLABLE = End(
        reason=EndReason.NODE_FAILED,
        detail="The trainer could not be killed: it is blocked in the kernel, by a device driver or a disk that hangs.",
    )
    """If the trainer ever continues, everything that it writes is ignored, because its claims have ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalExit:
    """How a trainer exited on this node."""

    reason: EndReason
    detail: str
    is_echo: bool = False
    """A failure on another node caused it, or this can't be ruled out."""
    is_of_any: bool = False
    """Any node may have caused it, because the trainers of all nodes exit in this way."""
    had_connected: bool = True
    """If `is_echo`: as far as is known, the processes of all nodes had connected before."""


def local_exit(
    context: WorkerContext, trainer: TrainerProcess, *, ranks: range | None = None, was_killed: bool = False
) -> LocalExit:
    """Return how the trainer exited on this node, from its exit status, its logs, OOM kills and the disk's state.

    The end of its log is copied to the worker's log. ranks: of the processes on this node, if others run on other
    nodes. was_killed: by its worker because of another node, so that the exit status is meaningless.
    """
    log_tail = without_handled(trainer.directory.log_tail(LOG_BYTES))
    exited = _diagnosed(context, trainer, log_tail, ranks=ranks, was_killed=was_killed)
    log.error("%s\n%s", exited.detail, log_tail)
    return exited


def _diagnosed(
    context: WorkerContext, trainer: TrainerProcess, log_tail: str, *, ranks: range | None, was_killed: bool
) -> LocalExit:
    is_disk_full = devices.is_disk_full(trainer.directory.path)
    returncode = trainer.returncode or 0
    if ranks is not None:
        tails = [without_handled(tail) for tail in trainer.directory.log_tails(LOG_BYTES)]
        peer = peer_failure(tails, ranks=ranks, returncode=None if was_killed else returncode)
        if peer.is_echo or not (peer.is_own or is_disk_full):
            detail = f"The trainer exited together with others of its gang. {peer.error}".strip()
            return LocalExit(reason=EndReason.INFRA_LOST, detail=detail, is_echo=True, had_connected=peer.is_reported)
    reason, detail = classify_exit(
        1 if was_killed else returncode,
        log_tail if ranks is None else without_peer_failures(log_tail, ranks),
        num_oom_kills=cgroup.oom_kills() - trainer.oom_kills_before,
        device_kind=context.device.kind,
        is_disk_full=is_disk_full,
    )
    return LocalExit(reason=reason, detail=detail, is_of_any=DIFFER.search(log_tail) is not None)


def launch_failure(error: LorryError | OSError | Abandoned) -> End:
    """Return how the attempts end when no trainer could be launched.

    An outage of the store or the database is not attributed to the node. If a base model can't be fetched or loaded,
    catalog.lifecycle.failures decides whether the node or the base model is at fault. The node causes every other
    failure.
    """
    if isinstance(error, Abandoned):
        return TrainerEnd.UNWANTED.value
    if isinstance(error, OSError):
        return End(reason=EndReason.NODE_FAILED, detail=f"The worker could not start a trainer: {error}.")
    if isinstance(error, NotGathered):
        return End(reason=EndReason.GANG_INCOMPLETE, detail=error.sentence())
    if isinstance(error, Unavailable):
        return End(reason=EndReason.INFRA_LOST, detail=error.sentence())
    is_of_base = isinstance(error, AttemptFailed | NotFound)
    return End(reason=EndReason.TRAINER_CRASHED if is_of_base else EndReason.NODE_FAILED, detail=error.sentence())


def job_failure(error: LorryError | OSError) -> End:
    """Return how one job's attempt ends when something failed for that job alone.

    A refused file is the user's error, although the preparation before the job would normally have refused it.
    """
    if isinstance(error, OSError):
        return End(reason=EndReason.NODE_FAILED, detail=f"The worker could not use a file: {error}.")
    reason = EndReason.INFRA_LOST
    if isinstance(error, FileRefused):
        reason = EndReason.USER_ERROR
    elif isinstance(error, UnsafePath | MalformedEvent):
        reason = EndReason.TRAINER_CRASHED
    return End(reason=reason, detail=error.sentence(), error=error.as_job_error())


def inbox_failure(error: OutOfSpace | OSError, *, worker_id: str) -> End:
    """Return how all attempts of a trainer end when the worker could not send it the message to stop a job."""
    reason = error.sentence() if isinstance(error, OutOfSpace) else f"{error}."
    detail = f"The worker could not send the trainer the message to stop a job: {reason}"
    return End(reason=EndReason.NODE_FAILED, detail=detail, blamed_worker_id=worker_id)
