"""Which jobs train together: the anchor is whose turn it is, packmates fill what it leaves. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from catalog.fair_share import Candidate, Turn
from catalog.memory import TICK_TOKENS, widens_tick

PATIENCE_SECONDS = 60.0
"""How long a job for another base may be passed over for the sake of a base that is loaded already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """What a worker has free."""

    max_jobs: int
    """Jobs that it can take now."""
    memory_bytes_free: int
    """On the device. The base of an empty trainer is counted: a job needs it, or it is unloaded for another."""
    resident_key: str | None = None
    """Pack key of its trainer, if it has one. A trainer holds its base in one dtype and takes no job of another."""
    num_jobs: int = 0
    """Jobs that are in its trainer already."""
    tick_tokens: int = TICK_TOKENS["cpu"]
    """What a tick grows to on its device."""
    recomputes: bool = False
    """Whether its device computes blocks again where memory is short."""

    def own(self, job: Candidate) -> int:
        """Bytes that the job takes beside its part of a tick."""
        return job.own_bytes - (job.saved_bytes if self.recomputes else 0)

    def alone(self, job: Candidate) -> int:
        """Bytes that the job takes with a trainer to itself."""
        return job.trainer_bytes + self.own(job)

    def cost(self, job: Candidate, *, num_before: int) -> int:
        """Bytes of a job that joins `num_before` others: its row, and its slice while the tick still grows.

        The first job's slice is in what its trainer needs.
        """
        return self.own(job) + (job.slice_bytes if widens_tick(num_before, tick_tokens=self.tick_tokens) else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A job that is let in, and why."""

    turn: Turn
    role: str
    """anchor, packmate or joiner."""
    reason: str


def pack_key(base_digest: str, precision: str, quantisation: str = "none") -> str:
    """Jobs train together where this is equal: base, dtype with quantisation, task head."""
    weights = precision if quantisation == "none" else f"{precision}+{quantisation}"
    return f"{base_digest}:{weights}:causal-lm"


def precision_of(key: str) -> str:
    """The dtype within a pack key."""
    return _weights_of(key).partition("+")[0]


def quantisation_of(key: str) -> str:
    """none, nf4 or int8: how the base's linears are held."""
    return _weights_of(key).partition("+")[2] or "none"


def weights_of(key: str) -> str:
    """Dtype and quantisation for a sentence: float32; nf4 with bfloat16."""
    quantisation = quantisation_of(key)
    return precision_of(key) if quantisation == "none" else f"{quantisation} with {precision_of(key)}"


def _weights_of(key: str) -> str:
    return key.rsplit(":", 2)[1]


def choose_pack(turns: Sequence[Turn], room: Room) -> list[Choice]:
    """A new trainer's first jobs: an anchor and its packmates; [] where nothing fits."""
    anchor = choose_anchor(turns, room)
    return [] if anchor is None else [anchor, *choose(anchor, turns, room)]


def choose_anchor(turns: Sequence[Turn], room: Room) -> Choice | None:
    """Whose turn it is. A job for the resident trainer goes first while the head of the queue has not waited long."""
    if room.max_jobs < 1:
        return None
    fitting = [turn for turn in turns if room.alone(turn.candidate) <= room.memory_bytes_free]
    if not fitting:
        return None
    head = fitting[0]
    if head.waited_seconds < PATIENCE_SECONDS:
        for turn in fitting:
            same_class = turn.candidate.priority == head.candidate.priority
            if same_class and turn.candidate.pack_key == room.resident_key:
                of_loaded = "first of its class for the base and dtype that are loaded"
                why = of_loaded if turn is not head else "first in the queue"
                return Choice(turn=turn, role="anchor", reason=why)
    return Choice(turn=head, role="anchor", reason="first in the queue of those that fit this worker")


def choose(anchor: Choice, candidates: Sequence[Turn], room: Room) -> list[Choice]:
    """Packmates for the anchor, in their own order. A suspect neither has nor becomes one."""
    if anchor.turn.candidate.is_suspect:
        return []
    left = room.memory_bytes_free - room.alone(anchor.turn.candidate)
    chosen: list[Choice] = []
    for turn in candidates:
        mate = turn.candidate
        if len(chosen) >= room.max_jobs - 1:
            break
        if turn is anchor.turn or mate.is_suspect or mate.pack_key != anchor.turn.candidate.pack_key:
            continue
        cost = room.cost(mate, num_before=len(chosen) + 1)
        if cost <= left:
            left -= cost
            reason = "same base and dtype as the anchor, and fits beside it"  # it may be another project's: no name
            chosen.append(Choice(turn=turn, role="packmate", reason=reason))
    return chosen


def choose_joiners(turns: Sequence[Turn], room: Room, key: str, *, worker_bytes: int) -> list[Choice]:
    """Jobs that may join a live trainer of pack key `key`.

    None that stands behind a job which can't join, has waited past the patience and would fit the worker
    (`worker_bytes` in all): the trainer is let run empty then, and that job is the next anchor.
    """
    left = room.memory_bytes_free
    chosen: list[Choice] = []
    for turn in turns:
        mate = turn.candidate
        if len(chosen) >= room.max_jobs:
            break
        cost = room.cost(mate, num_before=room.num_jobs + len(chosen))
        if mate.pack_key == key and not mate.is_suspect and cost <= left:
            left -= cost
            chosen.append(
                Choice(turn=turn, role="joiner", reason="its base is loaded and there is room beside the rest")
            )
            continue
        fits_alone = room.alone(mate) <= worker_bytes
        if fits_alone and turn.waited_seconds >= PATIENCE_SECONDS:
            break
    return chosen
