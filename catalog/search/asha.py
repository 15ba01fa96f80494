"""Asynchronous successive halving (ASHA, Li et al., arXiv 1810.05934) in the form that stops trials and resumes none.

The rule at a rung is that of Optuna's SuccessiveHalvingPruner: of the trials that have come to it so far, one goes on
that is among the best of every `reduction_factor`; the very first ones, only the best so far. Pure: counts in, a word
out. Nobody waits for anybody.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

USUAL_FACTOR = 3
USUAL_RUNGS = 3
"""Of a sweep that names no first rung: so many fit before the last step of its shortest trial."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rungs:
    """The steps at which trials are compared: min_steps, and reduction_factor times the one before."""

    min_steps: int
    reduction_factor: int
    max_rungs: int | None = None

    def before(self, num_steps: int) -> Iterator[int]:
        """The steps of the rungs, in order, that a trial of so many steps comes to before its end."""
        step, number = self.min_steps, 0
        while step < num_steps and (self.max_rungs is None or number < self.max_rungs):
            yield step
            step, number = step * self.reduction_factor, number + 1

    def at(self, step: int, *, num_steps: int) -> int | None:
        """The number of the rung at this step, from 0; None where there is none, and at a trial's last step."""
        return next((number for number, at in enumerate(self.before(num_steps)) if at == step), None)

    def goes_on(self, *, num_better: int, num_competing: int) -> bool:
        """num_competing: trials that have come to the rung, this one among them; num_better: of those, with a strictly
        better value."""
        return num_better < max(1, num_competing // self.reduction_factor)


def usual_min_steps(fewest_steps: int, *, reduction_factor: int, multiple_of: int = 1) -> int:
    """The first rung of trials that have this many steps at least: at a step at which they are evaluated."""
    wanted = max(1, fewest_steps // reduction_factor**USUAL_RUNGS)
    return -(-wanted // multiple_of) * multiple_of
