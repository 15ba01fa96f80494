"""Start reading here. `decide` says what a worker does with what it has free, and why: the rule of the whole queue."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from catalog.scheduling import contention, fair_share
from catalog.scheduling.ordering import Turn, order
from catalog.scheduling.packing import Choice, choose_anchor, choose_joiners, choose_pack
from catalog.scheduling.snapshot import Picture, Policy

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
class Nothing:
    """Nothing is taken."""

    reason: str
    choices: tuple[Choice, ...] = ()


Action = Start | Join | Nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What is done, and all that decided it which is nobody else's business: no job of another project, no name."""

    action: Action
    trace: Json
    in_turn: tuple[str, ...] = ()
    """Ids of the job that is chosen first and of those in its place, were it and those before taken; see
    contention.py."""

    def why(self, choice: Choice) -> Json:
        """Of one job that was chosen: for its record, and for who asks."""
        turn = choice.turn
        return {
            "role": choice.role,
            "reason": choice.reason,
            "position": turn.position,
            "turn": turn.reason,
            "waited_seconds": turn.waited_seconds,
            "counts_as": turn.counts_as,
            "level": turn.level,
            "effective_level": turn.effective_level,
            "share": self.trace["shares"][turn.candidate.project_id],
            **{name: value for name, value in self.trace.items() if name != "shares"},
        }


def leading(picture: Picture, policy: Policy) -> Turn | None:
    """The job that a new trainer would be started for: its packmates are worth looking for before `decide`."""
    anchor = choose_anchor(turns_of(picture, policy), picture.room, patience_seconds=policy.patience_seconds)
    return None if anchor is None else anchor.turn


def decide(picture: Picture, policy: Policy) -> Decision:
    """What the worker of `picture` does now."""
    turns = turns_of(picture, policy)
    action, waits_for = _action(picture, policy, turns)
    room = picture.room
    trace: Json = {
        "as_of": picture.now,
        "looked_at": len(turns),
        "room": {"max_jobs": room.max_jobs, "memory_bytes_free": room.memory_bytes_free, "num_jobs": room.num_jobs},
        "resident_key": room.resident_key,
        "is_let_run_empty": waits_for is not None and waits_for.waited_seconds >= policy.patience_seconds,
        "is_room_being_made": waits_for is not None and waits_for.is_made_room_for,
        "policy": asdict(policy),
        "shares": {
            project_id: fair_share.described(picture.shares, project_id, policy)
            for project_id in {choice.turn.candidate.project_id for choice in action.choices}
        },
    }
    after = contention.in_turn(picture, turns, action.choices[0].turn, policy) if action.choices else ()
    return Decision(action=action, trace=trace, in_turn=after)


def turns_of(picture: Picture, policy: Policy) -> list[Turn]:
    """Each candidate that nobody has taken once, first turn first."""
    once = {job.job_id: job for job in picture.candidates if job.job_id not in picture.taken}
    return order(once.values(), picture.now, shares=picture.shares, served=picture.served, policy=policy)


def _action(picture: Picture, policy: Policy, turns: list[Turn]) -> tuple[Action, Turn | None]:
    """And for whose sake no further ones join."""
    if picture.has_suspect:
        return Nothing(reason="a job in the trainer ended badly twice and trains alone"), None
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
        return Nothing(reason=reason), waits_for
    return _nothing(turns), None


def _nothing(turns: list[Turn]) -> Nothing:
    return Nothing(reason="none of the jobs that wait fits" if turns else "no job waits")
