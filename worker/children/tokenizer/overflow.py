"""What becomes of a row that has more tokens than are kept of one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from catalog.spec.data import Overflow

Tokens = tuple[NDArray[np.int64], NDArray[np.uint8]]
"""(ids, mask) of a row; both [T], mask 1 for what is learnt."""


def fit(row: Tokens, *, max_length: int, overflow: Overflow) -> list[Tokens]:
    """The row as rows of at most `max_length` tokens.

    Each piece of a split row stands for itself: its first token is read and not learnt, as nothing in the piece
    predicts it. So of a long text one label is lost for every max_length tokens.
    """
    ids, mask = row
    if len(ids) <= max_length:
        return [row]
    if overflow == "drop":
        return []
    if overflow == "truncate":
        return [(ids[:max_length], mask[:max_length])]
    starts = range(0, len(ids), max_length)
    return [_piece(ids[start : start + max_length], mask[start : start + max_length]) for start in starts]


def _piece(ids: NDArray[np.int64], mask: NDArray[np.uint8]) -> Tokens:
    learnt = mask.copy()
    learnt[0] = 0
    return ids, learnt
