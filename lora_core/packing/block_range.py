# pyright: basic
"""Which blocks of the base a pass runs: all, only the lowest, or only the highest.

Letters: T tokens, D features. What a job leaves frozen below its lowest adapter is its prefix; see
lora_core/engine/prefix_cache.py.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """The block at which the sequences of a slice may enter the base; all below it is frozen for `job`.

    `keeps`: the job will see these sequences again, so what enters the block is worth keeping.
    """

    block: int
    job: str
    keeps: bool


@dataclass(kw_only=True, slots=True)
class Passage:
    """Blocks [first, last) are run. `entering_TD` goes into the first; `left_TD` becomes what would enter `last`."""

    first: int = 0
    entering_TD: Tensor | None = None
    last: int | None = None
    left_TD: Tensor | None = None
