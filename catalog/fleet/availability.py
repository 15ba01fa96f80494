"""Workers that take nothing new, in sentences for who asks where a job is. Pure; who they are is in cordons."""

from __future__ import annotations

from collections.abc import Sequence

from catalog.fleet.views import LoadedTrainer
from catalog.tables.fleet import Worker
from catalog.tables.table import Json

REMEDY = "An operator lets one take jobs again: lorry workers uncordon ID."


def open_ones(residents: Sequence[LoadedTrainer]) -> list[LoadedTrainer]:
    return [resident for resident in residents if not resident.takes_nothing_new]


def facts(residents: Sequence[LoadedTrainer]) -> list[Json]:
    """Of each that takes nothing new: worker_id, and by and reason of its cordon, where it has one."""
    closed = (resident for resident in residents if resident.takes_nothing_new)
    return [{"worker_id": one.worker_id, **_cordon_summary(one.cordon)} for one in closed]


def where_all_are(residents: Sequence[LoadedTrainer]) -> str | None:
    """Why nothing is taken, where workers live and none takes anything new."""
    if not residents or open_ones(residents):
        return None
    if len(residents) == 1:
        return f"{_sentence(residents[0])} It is the only worker that runs. {REMEDY}"
    told = next((one for one in residents if one.cordon is not None), residents[0])
    none = f"None of the {len(residents)} workers that run takes new jobs: all are cordoned or leaving."
    return f"{none} {_sentence(told)} {REMEDY}"


def where_its_base_is(residents: Sequence[LoadedTrainer], base_digest: str) -> str | None:
    """Why it can't join where its base is loaded."""
    held = [one for one in residents if one.takes_nothing_new and one.base_digest == base_digest]
    return f"Its base is loaded elsewhere too, but: {_sentence(held[0])}" if held else None


def around(worker: Worker | None) -> str | None:
    """Of the worker that trains a job."""
    if worker is None or worker.ended_at is not None:
        return None
    if worker.drain_requested:
        return "That worker was asked to leave: the job is saved and goes on elsewhere."
    return "That worker is cordoned: it finishes this job and takes no new one." if worker.cordon else None


def _sentence(resident: LoadedTrainer) -> str:
    if resident.cordon is None:
        return f"Worker {resident.worker_id} was asked to leave."
    reason = resident.cordon.get("reason")
    return f"Worker {resident.worker_id} is cordoned{f': {reason}' if reason else '.'}".rstrip(".") + "."


def _cordon_summary(cordon: Json | None) -> Json:
    return {} if cordon is None else {"by": cordon["by"], "reason": cordon["reason"]}
