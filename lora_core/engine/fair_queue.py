# pyright: strict
"""Whose slices make the next tick: pure. The job with the fewest tokens served is never passed over."""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_core.config import Kind


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadySlice:
    """A job with a slice ready: its size in tokens, and the tokens that the job was served so far.

    `further`: tokens of the slices that follow it in the same step or evaluation.
    """

    job: str
    kind: Kind
    num_tokens: int
    served: int
    further: tuple[int, ...] = ()


def select_slices(waiting: Sequence[ReadySlice], *, token_budget: int) -> list[ReadySlice]:
    """At most one slice a job, of one kind, within the budget; the first goes alone if it exceeds it.

    Deficit round-robin in tokens (Shreedhar and Varghese 1996), with the debt kept as tokens served: a large
    job waits while small ones catch up, and whatever fits beside the first is taken.
    """
    order = sorted(waiting, key=lambda turn: turn.served)
    chosen: list[ReadySlice] = []
    left = token_budget
    for turn in order:
        if not chosen or (turn.kind == chosen[0].kind and turn.num_tokens <= left):
            chosen.append(turn)
            left -= turn.num_tokens
    return chosen


def widen(chosen: Sequence[ReadySlice], *, token_budget: int, job_tokens: int) -> list[tuple[int, ...]]:
    """Tokens of the slices that each chosen job puts into the tick: its first, and further ones while there is room.

    They are dealt out one by one in the order of turns. A job with more than one has at most `job_tokens` in all.
    """
    tokens = [[turn.num_tokens] for turn in chosen]
    left = token_budget - sum(turn.num_tokens for turn in chosen)
    dealt = True
    while dealt:
        dealt = False
        for turn, own in zip(chosen, tokens, strict=True):
            following = turn.further[len(own) - 1 : len(own)]
            if following and following[0] <= min(left, job_tokens - sum(own)):
                own.append(following[0])
                left -= following[0]
                dealt = True
    return [tuple(own) for own in tokens]
