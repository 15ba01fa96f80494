"""Which jobs train together: the anchor is whose turn it is, packmates fill what it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from catalog.scheduling.ordering import QueueEntry
from catalog.scheduling.snapshot import PATIENCE_SECONDS, Capacity


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A job that is let in, and why."""

    entry: QueueEntry
    role: str
    """anchor, packmate or joiner."""
    reason: str


def choose_pack(
    entries: Sequence[QueueEntry], capacity: Capacity, *, patience_seconds: float = PATIENCE_SECONDS
) -> list[Choice]:
    """A new trainer's first jobs: an anchor and its packmates; [] where nothing fits."""
    anchor = choose_anchor(entries, capacity, patience_seconds=patience_seconds)
    return [] if anchor is None else [anchor, *choose(anchor, entries, capacity)]


def choose_anchor(
    entries: Sequence[QueueEntry], capacity: Capacity, *, patience_seconds: float = PATIENCE_SECONDS
) -> Choice | None:
    """Whose turn it is, or the first that goes before for the sake of what is loaded."""
    if capacity.max_jobs < 1:
        return None
    fitting = [entry for entry in entries if capacity.alone(entry.candidate) <= capacity.memory_bytes_free]
    if not fitting:
        return None
    head, loaded = fitting[0], for_what_is_loaded(fitting, capacity, patience_seconds=patience_seconds)
    if not loaded:
        return Choice(entry=head, role="anchor", reason="first in the queue of those that fit this worker")
    is_head = loaded[0] is head
    why = "first in the queue" if is_head else "first of its class for the base and dtype that are loaded"
    return Choice(entry=loaded[0], role="anchor", reason=why)


def for_what_is_loaded(
    fitting: Sequence[QueueEntry], capacity: Capacity, *, patience_seconds: float
) -> list[QueueEntry]:
    """Jobs for the resident trainer, of the class of the head of the queue, which go before it while it has not waited
    long. None goes before a job for which room is being made: who began would take it."""
    head = fitting[0]
    if head.waited_seconds >= patience_seconds:
        return []
    waits = (number for number, entry in enumerate(fitting, start=1) if entry.awaits_preemption)
    before = fitting[: next(waits, None)]
    alike = (head.candidate.priority, capacity.resident_key)
    of_it = [entry for entry in before if (entry.candidate.priority, entry.candidate.pack_key) == alike]
    return [entry for entry in of_it if capacity.may_join(entry.candidate)]


def choose(anchor: Choice, candidates: Sequence[QueueEntry], capacity: Capacity) -> list[Choice]:
    """Packmates for the anchor, in their own order. A suspect neither has nor becomes one."""
    if anchor.entry.candidate.is_suspect:
        return []
    left = capacity.memory_bytes_free - capacity.alone(anchor.entry.candidate)
    holding = capacity.holding_for(anchor.entry.candidate)
    chosen: list[Choice] = []
    for entry in candidates:
        mate = entry.candidate
        if len(chosen) >= capacity.max_jobs - 1:
            break
        if entry is anchor.entry or mate.is_suspect or mate.pack_key != anchor.entry.candidate.pack_key:
            continue
        cost = capacity.cost(mate, num_before=len(chosen) + 1)
        if cost <= left and capacity.trains(mate, holding=holding):
            left -= cost
            reason = "same base and dtype as the anchor, and fits beside it"  # it may be another project's: no name
            chosen.append(Choice(entry=entry, role="packmate", reason=reason))
    return chosen


def spare_bytes(choices: Sequence[Choice], capacity: Capacity) -> int:
    """Of its own that one more job of their kind may have beside all these; below 0: none fits, however small."""
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
    """Jobs that may join a live trainer of pack key `key`, and the one for whose sake no further ones do.

    None joins that stands behind a job which can't, would fit the worker (`worker_bytes` in all) and has waited past
    the patience: the trainer is let run empty then, and that job is the next anchor. Nor behind one for which room is
    being made: who joined would take it.
    """
    left = capacity.memory_bytes_free
    chosen: list[Choice] = []
    for entry in entries:
        mate = entry.candidate
        if len(chosen) >= capacity.max_jobs:
            break
        cost = capacity.cost(mate, num_before=capacity.num_jobs + len(chosen))
        if mate.pack_key == key and not mate.is_suspect and cost <= left and capacity.may_join(mate):
            left -= cost
            reason = "its base is loaded and there is room beside the rest"
            chosen.append(Choice(entry=entry, role="joiner", reason=reason))
        elif capacity.alone(mate) <= worker_bytes and (
            entry.awaits_preemption or entry.waited_seconds >= patience_seconds
        ):
            return chosen, entry
    return chosen, None
