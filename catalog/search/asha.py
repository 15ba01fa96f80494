"""Asynchronous successive halving (ASHA, Li et al., arXiv 1810.05934) in the form that stops trials and resumes none.

The rule is that of Optuna's SuccessiveHalvingPruner. A trial continues at a rung if it is among the best
1/`reduction_factor` of the trials that have reached the rung so far. While fewer than `reduction_factor` trials have
reached it, only the best one so far continues. No trial waits for another. Pure functions of counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

USUAL_FACTOR = 3
USUAL_RUNGS = 3
"""Default number of rungs before the last step of the shortest trial, for a sweep without min_steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rungs:
    """The steps at which trials are compared: min_steps, then each reduction_factor times the previous rung."""

    min_steps: int
    reduction_factor: int
    max_rungs: int | None = None

    def before(self, num_steps: int) -> Iterator[int]:
        """Yield the steps of the rungs, in order, that a trial of `num_steps` reaches before its last step."""
        step, number = self.min_steps, 0
        while step < num_steps and (self.max_rungs is None or number < self.max_rungs):
            yield step
            step, number = step * self.reduction_factor, number + 1

    def at(self, step: int, *, num_steps: int) -> int | None:
        """Return the number of the rung at this step, from 0; None if there is none. The last step is no rung."""
        return next((number for number, at in enumerate(self.before(num_steps)) if at == step), None)

    def continues(self, *, num_better: int, num_competing: int) -> bool:
        """Return whether a trial continues.

        `num_competing`: trials that have reached the rung, including this one. `num_better`: those of them with a
        strictly better value.
        """
        return num_better < max(1, num_competing // self.reduction_factor)


def usual_min_steps(fewest_steps: int, *, reduction_factor: int, multiple_of: int = 1) -> int:
    """Return the default first rung for trials of at least `fewest_steps`: a multiple of the evaluation interval."""
    wanted = max(1, fewest_steps // reduction_factor**USUAL_RUNGS)
    return -(-wanted // multiple_of) * multiple_of
