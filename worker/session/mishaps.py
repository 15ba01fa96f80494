"""Whose doing it is that a worker has no trainer, for its base can't be brought here or none could be started; and
what goes wrong with a job, or with a trainer's inbox, on the worker's side.
"""

from __future__ import annotations

from catalog.errors import LorryError, NotFound, OutOfSpace, Unavailable
from catalog.states import EndReason
from worker.background.base_models import ImportRefused
from worker.background.tokenization import FileRefused
from worker.protocol.trainer_paths import UnsafePath
from worker.session.session_job import End


def mishap(error: LorryError | OSError) -> End:
    """How the attempts end when no trainer could be launched.

    A node does not cause an outage of the store or the database. Where a base can't be fetched or loaded, the node or
    the base is at fault, which catalog.lifecycle.load_failures decides. The node causes every other failure.
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
