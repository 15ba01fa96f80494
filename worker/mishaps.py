"""Whose doing it is that a worker has no trainer: its base can't be brought here, or none could be started."""

from __future__ import annotations

from catalog.errors import LorryError, NotFound, Unavailable
from catalog.states import EndReason
from worker.bases import ImportRefused
from worker.held import End


def mishap(error: LorryError | OSError) -> End:
    """An outage of the store or the database is no node's doing. A base that can't be brought is like one that can't be
    loaded: the node's fault or the base's, which catalog.loads tells apart. All else is the node's."""
    if isinstance(error, OSError):
        return End(reason=EndReason.NODE_FAILED, detail=f"The worker could not start a trainer: {error}.")
    if isinstance(error, Unavailable):
        return End(reason=EndReason.INFRA_LOST, detail=error.sentence())
    is_of_base = isinstance(error, ImportRefused | NotFound)
    return End(reason=EndReason.TRAINER_CRASHED if is_of_base else EndReason.NODE_FAILED, detail=error.sentence())
