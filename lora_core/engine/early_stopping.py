# pyright: strict
"""Tracks the best evaluation of a job and decides on early stopping. Does not import torch."""

from dataclasses import dataclass

from lora_core.config import EarlyStoppingConfig


@dataclass(kw_only=True, slots=True)
class Selection:
    """State of model selection, part of a checkpoint. Losses are validation losses in nats.

    Steps are -1 and losses None before the first evaluation. Patience is measured from `marked_loss`, which only moves
    if the loss falls by more than `min_delta`. `num_stale` is the number of evaluations since then.
    """

    best_step: int = -1
    best_loss: float | None = None
    marked_loss: float | None = None
    num_stale: int = 0

    def book(self, *, step: int, loss: float, min_delta: float) -> bool:
        """Record the evaluation after `step`. Return whether it is the best so far."""
        if self.marked_loss is None or loss < self.marked_loss - min_delta:
            self.marked_loss, self.num_stale = loss, 0
        else:
            self.num_stale += 1
        if self.best_loss is not None and loss >= self.best_loss:
            return False
        self.best_step, self.best_loss = step, loss
        return True

    def reason_to_stop(self, rule: EarlyStoppingConfig | None) -> str | None:
        """Return a sentence with the reason to stop, or None to continue."""
        if rule is None or self.num_stale < rule.patience:
            return None
        margin = f" by more than {rule.min_delta:g}" if rule.min_delta else ""
        count = f"{self.num_stale} evaluations" if self.num_stale > 1 else "one evaluation"
        return f"The validation loss has not fallen below {self.marked_loss:.4f}{margin} in {count}."
