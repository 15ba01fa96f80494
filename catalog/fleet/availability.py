"""Explains why workers accept no new jobs, in sentences for users. Pure: no database."""

from __future__ import annotations

from collections.abc import Sequence

from catalog.fleet.views import LoadedTrainer
from catalog.tables.fleet import Worker
from catalog.tables.table import Json

REMEDY = "An operator can make one available again: lorry workers uncordon ID."


def accepting(residents: Sequence[LoadedTrainer]) -> list[LoadedTrainer]:
    return [resident for resident in residents if not resident.takes_nothing_new]


def facts(residents: Sequence[LoadedTrainer]) -> list[Json]:
    """Return worker_id, and by and reason of the cordon if there is one, of each worker that accepts no new jobs."""
    closed = (resident for resident in residents if resident.takes_nothing_new)
    return [{"worker_id": one.worker_id, **_cordon_summary(one.cordon)} for one in closed]


def why_all_closed(residents: Sequence[LoadedTrainer]) -> str | None:
    """Return the reason why no job starts if every live worker rejects new jobs; None otherwise."""
    if not residents or accepting(residents):
        return None
    if len(residents) == 1:
        return f"{_sentence(residents[0])} It is the only running worker. {REMEDY}"
    shown = next((one for one in residents if one.cordon is not None), residents[0])
    none = f"None of the {len(residents)} running workers accepts new jobs: all are cordoned or draining."
    return f"{none} {_sentence(shown)} {REMEDY}"


def why_base_closed(residents: Sequence[LoadedTrainer], base_digest: str) -> str | None:
    """Return the reason why a job can't join a loaded trainer of its base model; None if there is no such trainer."""
    unavailable = [one for one in residents if one.takes_nothing_new and one.base_digest == base_digest]
    return (
        f"Its base model is also loaded on a worker that accepts no new jobs. {_sentence(unavailable[0])}"
        if unavailable
        else None
    )


def around(worker: Worker | None) -> str | None:
    """Return a sentence about the drain or cordon of the worker that trains a job; None if there is neither."""
    if worker is None or worker.ended_at is not None:
        return None
    if worker.drain_requested:
        return "That worker is draining: the job saves a checkpoint and continues on another worker."
    return "That worker is cordoned: it finishes this job and accepts no new one." if worker.cordon else None


def _sentence(resident: LoadedTrainer) -> str:
    if resident.cordon is None:
        return f"Worker {resident.worker_id} is draining."
    reason = resident.cordon.get("reason")
    return f"Worker {resident.worker_id} is cordoned{f': {reason}' if reason else '.'}".rstrip(".") + "."


def _cordon_summary(cordon: Json | None) -> Json:
    return {} if cordon is None else {"by": cordon["by"], "reason": cordon["reason"]}
