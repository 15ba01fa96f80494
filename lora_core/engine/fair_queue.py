# pyright: strict
"""Selects the slices of the next tick fairly, by pure functions. The least served job is always selected."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_core.config import Kind


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadySlice:
    """A job with its next slice, and the tokens that it was served so far.

    `further` contains the tokens of the following slices of the same step or evaluation.
    """

    job: str
    kind: Kind
    num_tokens: int
    served: int
    further: tuple[int, ...] = ()


def select_slices(waiting: Sequence[ReadySlice], *, token_budget: int) -> list[ReadySlice]:
    """Select at most one slice per job, all of one kind and within the budget. The first is selected even if too large.

    Deficit round-robin in tokens (Shreedhar and Varghese 1996) that keeps the debt as tokens served. A job with large
    slices waits while the others catch up. Any slice that still fits is selected too.
    """
    order = sorted(waiting, key=lambda ready: ready.served)
    chosen: list[ReadySlice] = []
    left = token_budget
    for ready in order:
        if not chosen or (ready.kind == chosen[0].kind and ready.num_tokens <= left):
            chosen.append(ready)
            left -= ready.num_tokens
    return chosen


def widen(
    chosen: Sequence[ReadySlice], *, token_budget: int, job_tokens: int, job_slices: float = math.inf
) -> list[tuple[int, ...]]:
    """Return the tokens of the slices that each selected job puts into the tick.

    While there is room, further slices are added round-robin in the order of `chosen`. A job with more than one slice
    has at most `job_tokens` and `job_slices` in all.
    """
    tokens = [[ready.num_tokens] for ready in chosen]
    left = token_budget - sum(ready.num_tokens for ready in chosen)
    has_added = True
    while has_added:
        has_added = False
        for ready, own in zip(chosen, tokens, strict=True):
            following = ready.further[len(own) - 1 : len(own)]
            if following and len(own) < job_slices and following[0] <= min(left, job_tokens - sum(own)):
                own.append(following[0])
                left -= following[0]
                has_added = True
    return [tuple(own) for own in tokens]
