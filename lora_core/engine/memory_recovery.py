# pyright: basic
"""What the engine does after a tick ran out of memory, and how large later ticks may be.

`recover` takes the first of four measures that applies: 1. ticks of this size recompute their blocks in the backward
pass. 2. Ticks have at most half of the tokens. 3. A slice that is alone in its tick goes to another rank. 4. The job of
a slice that fits no rank is given up.
"""

from lora_core.engine.step import TickPlan
from lora_core.layers.activation_checkpointing import ActivationMemory

RECOVERY_TICKS = 1024
"""Successful ticks in a row after which the limit has grown by the whole token budget again."""
REDUCTION = 4
"""The factor by which ticks are smaller while a job is loaded that ran out of memory once, in an earlier attempt."""


class MemoryRecovery:
    """The limits that memory sets to ticks: `max_tokens` of a tick on all ranks together, and the `short_ranks`, on
    which a slice alone did not fit. What else is on a device differs from rank to rank."""

    def __init__(self, activations: ActivationMemory, *, token_budget: int, num_ranks: int) -> None:
        """`token_budget`: tokens of a tick on one rank."""
        self._activations = activations
        self._growth = max(1, token_budget // RECOVERY_TICKS)
        self._num_ranks = num_ranks
        self._token_budget = self.max_tokens = num_ranks * token_budget
        self.short_ranks: set[int] = set()

    def recover(self, plan: TickPlan) -> bool:
        """Adapt to a tick that did not fit. False: its only slice fits no rank."""
        can_recompute = plan.kind == "train" and not plan.checkpointed
        if can_recompute and self._activations.gives_way(plan.largest_share):
            return True
        if len(plan.sizes) == 1:
            self.short_ranks.update(plan.ranks)
            if len(self.short_ranks) == self._num_ranks:
                self.short_ranks.clear()
                return False
        self.max_tokens = max(1, plan.num_tokens // 2)
        return True

    def grow(self) -> None:
        """After a tick that fitted: the limit rises by a part of the budget."""
        self.max_tokens = min(self._token_budget, self.max_tokens + self._growth)

    def tokens_after(self, shortages: int) -> int:
        """The most tokens of a tick beside a job whose attempts ran out of memory `shortages` times: all, a part, or
        one slice at a time."""
        if shortages == 0:
            return self.max_tokens
        return min(self.max_tokens, max(1, self._token_budget // REDUCTION) if shortages == 1 else 1)

    def forget(self) -> None:
        """After a job has left: what its ticks showed of activations and ranks need not hold for the others."""
        self._activations.forget()
        self.short_ranks.clear()
