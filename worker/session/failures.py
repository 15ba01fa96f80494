"""How a trainer ended, or of one of several nodes the part here: from what its worker can see of it."""

from __future__ import annotations

from dataclasses import dataclass

from catalog.errors import LorryError, NotFound, OutOfSpace, Unavailable
from catalog.states import EndReason
from worker.background.base_models import ImportRefused
from worker.background.tokenization import FileRefused
from worker.context.context import WorkerContext
from worker.node import cgroup, devices
from worker.process.exit_status import DIFFER, classify_exit, heard, without_others
from worker.process.launcher import TrainerProcess
from worker.protocol.errors import without_handled
from worker.protocol.trainer_paths import UnsafePath
from worker.session.session_job import End

LOG_BYTES = 16_000
"""Of each process's last words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnEnd:
    reason: EndReason
    detail: str
    log_tail: str
    is_echo: bool = False
    """It followed from another node's end, or nothing tells that it did not."""
    is_of_any: bool = False
    """It may be any node's doing, for all of them end so."""
    had_met: bool = True
    """Of an echo: the processes of all nodes had, as far as is known."""


def own_end(
    context: WorkerContext, trainer: TrainerProcess, *, ranks: range | None = None, was_killed: bool = False
) -> OwnEnd:
    """ranks: the numbers of the processes here, where others are on other nodes. was_killed: by its worker, for what
    another one was seen to do, so its status tells nothing."""
    is_disk_full = devices.is_disk_full(trainer.directory.path)
    log_tail = without_handled(trainer.directory.log_tail(LOG_BYTES))
    returncode = trainer.returncode or 0
    if ranks is not None:
        logs = [without_handled(log) for log in trainer.directory.log_tails(LOG_BYTES)]
        told = heard(logs, ranks=ranks, returncode=None if was_killed else returncode)
        if told.is_echo or not (told.is_own or is_disk_full):
            detail = f"It ended with others of its gang. {told.said}".strip()
            lost = EndReason.INFRA_LOST
            return OwnEnd(reason=lost, detail=detail, log_tail=log_tail, is_echo=True, had_met=told.is_told)
    reason, detail = classify_exit(
        1 if was_killed else returncode,
        log_tail if ranks is None else without_others(log_tail, ranks),
        num_oom_kills=cgroup.oom_kills() - trainer.oom_kills_before,
        device_kind=context.device.kind,
        is_disk_full=is_disk_full,
    )
    return OwnEnd(reason=reason, detail=detail, log_tail=log_tail, is_of_any=DIFFER.search(log_tail) is not None)


def mishap(error: LorryError | OSError) -> End:
    """How the attempts end when no trainer could be launched.

    A node does not cause an outage of the store or the database. Where a base can't be fetched or loaded, the node or
    the base is at fault, which catalog.lifecycle.failures decides. The node causes every other failure.
    """
    if isinstance(error, OSError):
        return End(reason=EndReason.NODE_FAILED, detail=f"The worker could not start a trainer: {error}.")
    if isinstance(error, Unavailable):
        return End(reason=EndReason.INFRA_LOST, detail=error.sentence())
    is_of_base = isinstance(error, ImportRefused | NotFound)
    return End(reason=EndReason.TRAINER_CRASHED if is_of_base else EndReason.NODE_FAILED, detail=error.sentence())


def mishap_of_job(error: LorryError | OSError) -> End:
    """What went wrong with one job alone. A file that is refused now would have been before the job began."""
    if isinstance(error, LorryError):
        wire = error.as_job_error()
        if isinstance(error, FileRefused):
            return End(reason=EndReason.USER_ERROR, detail=error.sentence(), error=wire)
        if isinstance(error, UnsafePath):
            return End(reason=EndReason.TRAINER_CRASHED, detail=error.sentence(), error=wire)
        return End(reason=EndReason.INFRA_LOST, detail=error.sentence(), error=wire)
    return End(reason=EndReason.NODE_FAILED, detail=f"The worker could not use a file: {error}.")


def untold(error: OutOfSpace | OSError, *, worker_id: str) -> End:
    """Of all that a trainer holds which could not be told to let a job go."""
    why = error.sentence() if isinstance(error, OutOfSpace) else f"{error}."
    detail = f"The trainer could not be told to let go of a job: {why}"
    return End(reason=EndReason.NODE_FAILED, detail=detail, blamed_worker_id=worker_id)
