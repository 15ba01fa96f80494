"""Which jobs train together: the anchor is whose turn it is, packmates fill what it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from catalog.scheduling.ordering import QueueEntry
from catalog.scheduling.snapshot import PATIENCE_SECONDS, Capacity


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A job that is let in, and why."""

    turn: QueueEntry
    role: str
    """anchor, packmate or joiner."""
    reason: str


def choose_pack(
    turns: Sequence[QueueEntry], room: Capacity, *, patience_seconds: float = PATIENCE_SECONDS
) -> list[Choice]:
    """A new trainer's first jobs: an anchor and its packmates; [] where nothing fits."""
    anchor = choose_anchor(turns, room, patience_seconds=patience_seconds)
    return [] if anchor is None else [anchor, *choose(anchor, turns, room)]


def choose_anchor(
    turns: Sequence[QueueEntry], room: Capacity, *, patience_seconds: float = PATIENCE_SECONDS
) -> Choice | None:
    """Whose turn it is, or the first that goes before for the sake of what is loaded."""
    if room.max_jobs < 1:
        return None
    fitting = [turn for turn in turns if room.alone(turn.candidate) <= room.memory_bytes_free]
    if not fitting:
        return None
    head, loaded = fitting[0], for_what_is_loaded(fitting, room, patience_seconds=patience_seconds)
    if not loaded:
        return Choice(turn=head, role="anchor", reason="first in the queue of those that fit this worker")
    is_head = loaded[0] is head
    why = "first in the queue" if is_head else "first of its class for the base and dtype that are loaded"
    return Choice(turn=loaded[0], role="anchor", reason=why)


def for_what_is_loaded(fitting: Sequence[QueueEntry], room: Capacity, *, patience_seconds: float) -> list[QueueEntry]:
    """Jobs for the resident trainer, of the class of the head of the queue, which go before it while it has not waited
    long. None goes before a job for which room is being made: who began would take it."""
    head = fitting[0]
    if head.waited_seconds >= patience_seconds:
        return []
    waits = (number for number, turn in enumerate(fitting, start=1) if turn.is_made_room_for)
    before = fitting[: next(waits, None)]
    alike = (head.candidate.priority, room.resident_key)
    of_it = [turn for turn in before if (turn.candidate.priority, turn.candidate.pack_key) == alike]
    return [turn for turn in of_it if room.may_join(turn.candidate)]


def choose(anchor: Choice, candidates: Sequence[QueueEntry], room: Capacity) -> list[Choice]:
    """Packmates for the anchor, in their own order. A suspect neither has nor becomes one."""
    if anchor.turn.candidate.is_suspect:
        return []
    left = room.memory_bytes_free - room.alone(anchor.turn.candidate)
    holding = room.holding_for(anchor.turn.candidate)
    chosen: list[Choice] = []
    for turn in candidates:
        mate = turn.candidate
        if len(chosen) >= room.max_jobs - 1:
            break
        if turn is anchor.turn or mate.is_suspect or mate.pack_key != anchor.turn.candidate.pack_key:
            continue
        cost = room.cost(mate, num_before=len(chosen) + 1)
        if cost <= left and room.trains(mate, holding=holding):
            left -= cost
            reason = "same base and dtype as the anchor, and fits beside it"  # it may be another project's: no name
            chosen.append(Choice(turn=turn, role="packmate", reason=reason))
    return chosen


def spare_bytes(choices: Sequence[Choice], room: Capacity) -> int:
    """Of its own that one more job of their kind may have beside all these; below 0: none fits, however small."""
    jobs = [choice.turn.candidate for choice in choices]
    num_before = room.num_jobs if choices[0].role == "joiner" else 0
    used = sum(room.cost(job, num_before=number) for number, job in enumerate(jobs, start=num_before))
    if choices[0].role == "anchor":
        used += room.alone(jobs[0]) - room.cost(jobs[0], num_before=0)
    width = room.cost(jobs[0], num_before=num_before + len(jobs)) - room.own(jobs[0])
    return room.memory_bytes_free - used - width


def choose_joiners(
    turns: Sequence[QueueEntry],
    room: Capacity,
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
    left = room.memory_bytes_free
    chosen: list[Choice] = []
    for turn in turns:
        mate = turn.candidate
        if len(chosen) >= room.max_jobs:
            break
        cost = room.cost(mate, num_before=room.num_jobs + len(chosen))
        if mate.pack_key == key and not mate.is_suspect and cost <= left and room.may_join(mate):
            left -= cost
            reason = "its base is loaded and there is room beside the rest"
            chosen.append(Choice(turn=turn, role="joiner", reason=reason))
        elif room.alone(mate) <= worker_bytes and (turn.is_made_room_for or turn.waited_seconds >= patience_seconds):
            return chosen, turn
    return chosen, None
