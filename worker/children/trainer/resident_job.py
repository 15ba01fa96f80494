"""What the trainer knows of a job beyond what the engine holds. Runs in the trainer; knows no torch."""

from __future__ import annotations

from dataclasses import dataclass

from worker.children.trainer.sampling import Asked


@dataclass(kw_only=True, slots=True)
class Resident:
    """One job that the trainer has admitted."""

    checkpoint_every_steps: int
    base_name: str
    num_steps: int
    asked: Asked | None = None
    """What it answers at each evaluation."""
    saved_step: int
    """Step of the newest checkpoint that our parent was told of, or of the resume point; 0: none."""

    def is_checkpoint_due(self, step: int) -> bool:
        """Its last step has its adapter instead."""
        return step % self.checkpoint_every_steps == 0 and step < self.num_steps
