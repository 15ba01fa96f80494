# pyright: strict
"""What evaluations decide: which step's weights are the best so far, and whether training goes on. No torch here."""

from dataclasses import dataclass

from lora_core.config import EarlyStoppingConfig


@dataclass(kw_only=True, slots=True)
class Selection:
    """A part of a checkpoint. Losses are held-out ones in nats; steps -1 and losses None where there was none yet.

    `marked_loss` is the one that patience is measured from: it moves only where the loss fell by more than
    `min_delta`. `num_stale`: evaluations since then.
    """

    best_step: int = -1
    best_loss: float | None = None
    marked_loss: float | None = None
    num_stale: int = 0

    def book(self, *, step: int, loss: float, min_delta: float) -> bool:
        """Whether the evaluation after `step` is the best so far."""
        if self.marked_loss is None or loss < self.marked_loss - min_delta:
            self.marked_loss, self.num_stale = loss, 0
        else:
            self.num_stale += 1
        if self.best_loss is not None and loss >= self.best_loss:
            return False
        self.best_step, self.best_loss = step, loss
        return True

    def reason_to_stop(self, rule: EarlyStoppingConfig | None) -> str | None:
        """A sentence, or None where training goes on."""
        if rule is None or self.num_stale < rule.patience:
            return None
        margin = f" by more than {rule.min_delta:g}" if rule.min_delta else ""
        count = f"{self.num_stale} evaluations" if self.num_stale > 1 else "one evaluation"
        return f"The held-out loss has not fallen below {self.marked_loss:.4f}{margin} in {count}."
