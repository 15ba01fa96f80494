"""Start reading here. `decide` says what a worker does with what it has free, and why: the rule of the whole queue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from catalog.scheduling import ordering
from catalog.scheduling.ordering import QueueEntry, order
from catalog.scheduling.packing import Choice, choose_anchor, choose_joiners, choose_pack, for_what_is_loaded
from catalog.scheduling.snapshot import Candidate, Policy, QueueSnapshot, Share, WorkerService

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """A new trainer, or one that is empty, begins with these: the anchor first."""

    choices: tuple[Choice, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Join:
    """These come to the jobs that train already."""

    choices: tuple[Choice, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wait:
    """Nothing is taken."""

    reason: str
    choices: tuple[Choice, ...] = ()


Action = Start | Join | Wait


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What is done, and all that decided it which is nobody else's business: no job of another project, no name."""

    action: Action
    trace: Json
    in_turn: tuple[str, ...] = ()
    """Ids of the job that is chosen first and of those in its place, were it and those before taken; see
    `fallback_order`."""

    def why(self, choice: Choice) -> Json:
        """Of one job that was chosen: for its record, and for who asks."""
        turn = choice.turn
        return {
            "role": choice.role,
            "reason": choice.reason,
            "position": turn.position,
            "turn": turn.reason,
            "waited_seconds": turn.waited_seconds,
            "effective_priority": turn.effective_priority,
            "normalized_usage": turn.level,
            "effective_level": turn.effective_level,
            "share": self.trace["shares"][turn.candidate.project_id],
            **{name: value for name, value in self.trace.items() if name != "shares"},
        }


def leading(picture: QueueSnapshot, policy: Policy) -> QueueEntry | None:
    """The job that a new trainer would be started for: its packmates are worth looking for before `decide`."""
    anchor = choose_anchor(ordered(picture, policy), picture.room, patience_seconds=policy.patience_seconds)
    return None if anchor is None else anchor.turn


def decide(picture: QueueSnapshot, policy: Policy) -> Decision:
    """What the worker of `picture` does now."""
    turns = ordered(picture, policy)
    action, waits_for = _action(picture, policy, turns)
    room = picture.room
    trace: Json = {
        "as_of": picture.now,
        "looked_at": len(turns),
        "room": {"max_jobs": room.max_jobs, "memory_bytes_free": room.memory_bytes_free, "num_jobs": room.num_jobs},
        "resident_key": room.resident_key,
        "is_draining_for_other_base": waits_for is not None and waits_for.waited_seconds >= policy.patience_seconds,
        "is_preempting": waits_for is not None and waits_for.is_made_room_for,
        "policy": asdict(policy),
        "shares": {
            project_id: ordering.describe_share(picture.shares, project_id, policy)
            for project_id in {choice.turn.candidate.project_id for choice in action.choices}
        },
    }
    after = fallback_order(picture, turns, action.choices[0].turn, policy) if action.choices else ()
    return Decision(action=action, trace=trace, in_turn=after)


def ordered(picture: QueueSnapshot, policy: Policy) -> list[QueueEntry]:
    """Each candidate that nobody has taken once, first turn first."""
    once = {job.job_id: job for job in picture.candidates if job.job_id not in picture.taken}
    return order(once.values(), picture.now, shares=picture.shares, served=picture.served, policy=policy)


def _action(picture: QueueSnapshot, policy: Policy, turns: list[QueueEntry]) -> tuple[Action, QueueEntry | None]:
    """And for whose sake no further ones join."""
    if picture.has_suspect:
        return Wait(reason="a job in the trainer ended badly twice and trains alone"), None
    patience = policy.patience_seconds
    if picture.live_key is None:
        chosen = choose_pack(turns, picture.room, patience_seconds=patience)
        return (Start(choices=tuple(chosen)) if chosen else _nothing(turns)), None
    chosen, waits_for = choose_joiners(
        turns, picture.room, picture.live_key, worker_bytes=picture.worker_bytes, patience_seconds=patience
    )
    if chosen:
        return Join(choices=tuple(chosen)), waits_for
    if waits_for is not None:
        reason = "a job that can't join has waited too long: the trainer is let run empty"
        if waits_for.is_made_room_for:
            reason = "room is being made for a job, and nobody joins before it"
        return Wait(reason=reason), waits_for
    return _nothing(turns), None


def _nothing(turns: list[QueueEntry]) -> Wait:
    return Wait(reason="none of the jobs that wait fits" if turns else "no job waits")


MAX_FALLBACKS = 32
"""So many are known ahead."""


def fallback_order(
    picture: QueueSnapshot, turns: Sequence[QueueEntry], first: QueueEntry, policy: Policy
) -> tuple[str, ...]:
    """`first`, which is chosen first, and who probably would be without it, and so on: ids of jobs.

    They end where a job of which nothing was read may come before the next.
    """
    found: list[str] = []
    read: Counter[tuple[str, int]] = Counter()
    for job in _like(picture, turns, first, policy):
        found.append(job.job_id)
        read[job.project_id, job.priority] += 1
        if len(found) == MAX_FALLBACKS or read[job.project_id, job.priority] == picture.per_group:
            break
    return tuple(found)


def snapshot_without(picture: QueueSnapshot, passed: Collection[str]) -> QueueSnapshot:
    """As if other workers, each like the one of this picture, had just begun these of its jobs."""
    shares = dict(picture.shares)
    served: dict[tuple[str, int], float] = {}
    for job in {job.job_id: job for job in picture.candidates if job.job_id in passed}.values():
        share = shares.get(job.project_id, Share())
        shares[job.project_id] = replace(
            share, num_running=share.num_running + 1, devices_held=share.devices_held + 1.0
        )
        served[job.project_id, job.priority] = picture.now
    recomputes, whole = picture.room.recomputes, max(picture.worker_bytes, picture.room.memory_bytes_free)
    given = WorkerService(at=served, memory_bytes=whole, recomputes=recomputes, group=picture.room.group)
    return replace(picture, shares=shares, served=(*picture.served, given), taken=passed)


def _like(
    picture: QueueSnapshot, turns: Sequence[QueueEntry], first: QueueEntry, policy: Policy
) -> Iterable[Candidate]:
    """Of the turns from the first on those that could be chosen first in its place."""
    room, key = picture.room, picture.live_key
    if key is not None:
        after = (turn.candidate for turn in turns[first.position - 1 :])
        fit = (job for job in after if room.cost(job, num_before=room.num_jobs) <= room.memory_bytes_free)
        return (job for job in fit if job.pack_key == key and not job.is_suspect and room.may_join(job))
    fitting = [turn for turn in turns if room.alone(turn.candidate) <= room.memory_bytes_free]
    loaded = for_what_is_loaded(fitting, room, patience_seconds=policy.patience_seconds)
    return (turn.candidate for turn in loaded or fitting)
