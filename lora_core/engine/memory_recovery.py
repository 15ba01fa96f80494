# pyright: basic
"""Recovers after a tick ran out of memory, and limits the size of later ticks.

`recover` applies the first possible of four measures:
1. Ticks of this size use activation checkpointing.
2. Ticks have at most half of the tokens.
3. A slice that is alone in its tick goes to another rank.
4. The job of a slice that fits on no rank is quarantined.
"""

from lora_core.engine.step import TickPlan
from lora_core.layers.activation_checkpointing import ActivationMemory

RECOVERY_TICKS = 1024
"""Successful ticks after which the limit has grown by a whole token budget."""
REDUCTION = 4
"""Factor by which ticks are smaller while a job is loaded whose earlier attempts ran out of memory once."""


class MemoryRecovery:
    """Memory limits of ticks.

    `max_tokens` is the limit for all ranks together. `short_ranks` are those on which a single slice did not fit, since
    free memory differs between ranks.
    """

    def __init__(self, activations: ActivationMemory, *, token_budget: int, num_ranks: int) -> None:
        """`token_budget` is the number of tokens of a tick on one rank."""
        self._activations = activations
        self._growth = max(1, token_budget // RECOVERY_TICKS)
        self._num_ranks = num_ranks
        self._token_budget = self.max_tokens = num_ranks * token_budget
        self.short_ranks: set[int] = set()

    def recover(self, plan: TickPlan) -> bool:
        """Adapt to a tick that ran out of memory. Return False if its only slice fits on no rank."""
        can_recompute = plan.kind == "train" and not plan.checkpointed
        if can_recompute and self._activations.force_checkpointing(plan.largest_share):
            return True
        if len(plan.sizes) == 1:
            self.short_ranks.update(plan.ranks)
            if len(self.short_ranks) == self._num_ranks:
                self.short_ranks.clear()
                return False
        self.max_tokens = max(1, plan.num_tokens // 2)
        return True

    def grow(self) -> None:
        """Raise the limit by a fraction of the budget. Call it after each successful tick."""
        self.max_tokens = min(self._token_budget, self.max_tokens + self._growth)

    def tokens_after(self, shortages: int) -> int:
        """Return the limit of a tick while a job is loaded whose attempts ran out of memory `shortages` times.

        0: no change. 1: a quarter of the budget. More: one slice at a time.
        """
        if shortages == 0:
            return self.max_tokens
        return min(self.max_tokens, max(1, self._token_budget // REDUCTION) if shortages == 1 else 1)

    def forget(self) -> None:
        """Discard what ticks have shown about activations and ranks. Call it after a job was evicted."""
        self._activations.forget()
        self.short_ranks.clear()
