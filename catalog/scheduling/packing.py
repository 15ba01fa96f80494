"""Selects jobs that train together: the anchor is the next eligible job, and packmates fill the free memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from catalog.scheduling.ordering import QueueEntry
from catalog.scheduling.snapshot import PATIENCE_SECONDS, Capacity


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A job that is chosen for a trainer, and the reason."""

    entry: QueueEntry
    role: str
    """anchor, packmate or joiner."""
    reason: str


def choose_pack(
    entries: Sequence[QueueEntry], capacity: Capacity, *, patience_seconds: float = PATIENCE_SECONDS
) -> list[Choice]:
    """Return the first jobs of a new trainer: an anchor and its packmates; [] if no job fits."""
    anchor = choose_anchor(entries, capacity, patience_seconds=patience_seconds)
    return [] if anchor is None else [anchor, *choose(anchor, entries, capacity)]


def choose_anchor(
    entries: Sequence[QueueEntry], capacity: Capacity, *, patience_seconds: float = PATIENCE_SECONDS
) -> Choice | None:
    """Return the first eligible job, or a job for the loaded base model that may go before it; None if no job fits."""
    if capacity.max_jobs < 1:
        return None
    fitting = [entry for entry in entries if capacity.alone(entry.candidate) <= capacity.memory_bytes_free]
    if not fitting:
        return None
    head, loaded = fitting[0], for_what_is_loaded(fitting, capacity, patience_seconds=patience_seconds)
    if not loaded:
        return Choice(entry=head, role="anchor", reason="first job in the queue that fits this worker")
    is_head = loaded[0] is head
    why = "first in the queue" if is_head else "first job of its class for the loaded base model and dtype"
    return Choice(entry=loaded[0], role="anchor", reason=why)


def for_what_is_loaded(
    fitting: Sequence[QueueEntry], capacity: Capacity, *, patience_seconds: float
) -> list[QueueEntry]:
    """Return the jobs for the resident trainer that may start before the head of the queue.

    They have the class of the head, and the head has waited less than `patience_seconds`. No job starts before a job
    that waits for preempted jobs to leave, because it would take the memory that they free.
    """
    head = fitting[0]
    if head.waited_seconds >= patience_seconds:
        return []
    waits = (number for number, entry in enumerate(fitting, start=1) if entry.awaits_preemption)
    before = fitting[: next(waits, None)]
    group = (head.candidate.priority, capacity.resident_key)
    members = [entry for entry in before if (entry.candidate.priority, entry.candidate.pack_key) == group]
    return [entry for entry in members if capacity.may_join(entry.candidate)]


def choose(anchor: Choice, candidates: Sequence[QueueEntry], capacity: Capacity) -> list[Choice]:
    """Return packmates for the anchor, in queue order. An isolated job (`is_suspect`) neither has nor is a packmate."""
    if anchor.entry.candidate.is_suspect:
        return []
    free_bytes = capacity.memory_bytes_free - capacity.alone(anchor.entry.candidate)
    holding = capacity.holding_for(anchor.entry.candidate)
    chosen: list[Choice] = []
    for entry in candidates:
        packmate = entry.candidate
        if len(chosen) >= capacity.max_jobs - 1:
            break
        if entry is anchor.entry or packmate.is_suspect or packmate.pack_key != anchor.entry.candidate.pack_key:
            continue
        cost = capacity.cost(packmate, num_before=len(chosen) + 1)
        if cost <= free_bytes and capacity.trains(packmate, holding=holding):
            free_bytes -= cost
            # The reason does not name the anchor, which may belong to another project.
            reason = "same base model and dtype as the anchor, and fits next to it"
            chosen.append(Choice(entry=entry, role="packmate", reason=reason))
    return chosen


def spare_bytes(choices: Sequence[Choice], capacity: Capacity) -> int:
    """Return the maximum `own_bytes` of one more job with the same pack key; below 0 if no further job fits."""
    jobs = [choice.entry.candidate for choice in choices]
    num_before = capacity.num_jobs if choices[0].role == "joiner" else 0
    used = sum(capacity.cost(job, num_before=number) for number, job in enumerate(jobs, start=num_before))
    if choices[0].role == "anchor":
        used += capacity.alone(jobs[0]) - capacity.cost(jobs[0], num_before=0)
    width = capacity.cost(jobs[0], num_before=num_before + len(jobs)) - capacity.own(jobs[0])
    return capacity.memory_bytes_free - used - width


def choose_joiners(
    entries: Sequence[QueueEntry],
    capacity: Capacity,
    key: str,
    *,
    worker_bytes: int,
    patience_seconds: float = PATIENCE_SECONDS,
) -> tuple[list[Choice], QueueEntry | None]:
    """Return the jobs that may join a live trainer of pack key `key`, and the job that keeps further jobs out, if any.

    A job keeps all jobs behind it out if it can't join, fits the worker when it is empty (`worker_bytes` in total), and
    has waited for `patience_seconds`: the trainer then drains, and this job is the next anchor. A job that waits for
    preempted jobs to leave keeps them out too, because they would take the memory that is freed.
    """
    free_bytes = capacity.memory_bytes_free
    chosen: list[Choice] = []
    for entry in entries:
        packmate = entry.candidate
        if len(chosen) >= capacity.max_jobs:
            break
        cost = capacity.cost(packmate, num_before=capacity.num_jobs + len(chosen))
        if packmate.pack_key == key and not packmate.is_suspect and cost <= free_bytes and capacity.may_join(packmate):
            free_bytes -= cost
            reason = "its base model is loaded, and it fits next to the other jobs"
            chosen.append(Choice(entry=entry, role="joiner", reason=reason))
        elif capacity.alone(packmate) <= worker_bytes and (
            entry.awaits_preemption or entry.waited_seconds >= patience_seconds
        ):
            return chosen, entry
    return chosen, None
