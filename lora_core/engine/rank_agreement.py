# pyright: basic
"""What the ranks of a trainer compare after each tick: the outcome of every job's step, and a job's weights.

All ranks have the same jobs and compute the same updates. So a job fails on all of them or on none, and ranks that
differ prove a fault of a device, of its memory or of the network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from lora_core.distributed.ranks import Ranks
from lora_core.engine.job import TrainingJob
from lora_core.errors import OutOfMemory, RanksDiffer
from lora_core.events import JobDiverged
from lora_core.layers.activation_checkpointing import ActivationMemory


class StepStatus(IntEnum):
    """How a tick ended for one job on one rank."""

    GOOD = 0
    OUT_OF_MEMORY = 1
    """During the job's update."""
    DIVERGED = 2
    DIVERGED_AFTER_GOOD_STEP = 3


@dataclass(kw_only=True, slots=True)
class StepOutcome:
    """What a tick has done to a job on this rank. `step` and `num_pending` (events) are those before the update."""

    job: TrainingJob
    step: int
    num_pending: int
    error: OutOfMemory | None = None

    @property
    def status(self) -> StepStatus:
        if self.error is not None:
            return StepStatus.OUT_OF_MEMORY
        for event in self.job.pending[self.num_pending :]:
            if isinstance(event, JobDiverged):
                return StepStatus.DIVERGED_AFTER_GOOD_STEP if event.good_step == event.step else StepStatus.DIVERGED
        return StepStatus.GOOD


def agree(ranks: Ranks, outcomes: Sequence[StepOutcome], activations: ActivationMemory) -> list[OutOfMemory]:
    """Compare the outcomes of a tick on all ranks, and plan later ticks for the rank that has the least memory.

    Returns one error for each job whose update ran out of memory on a rank: every rank has given it up. Raises
    RanksDiffer, on all ranks, if a job has not diverged on all of them in the same way and from the same weights.
    """
    # One exchange carries both, because each costs a round trip per tick.
    own = activations.own_memory() if ranks.size > 1 else (0, 0)
    of_ranks = ranks.numbers([*own, *(outcome.status for outcome in outcomes)])
    activations.heed(own, [(free_bytes, per_token) for free_bytes, per_token, *_ in of_ranks])
    errors: list[OutOfMemory] = []
    for number, outcome in enumerate(outcomes, start=len(own)):
        statuses = [of_rank[number] for of_rank in of_ranks]
        if StepStatus.OUT_OF_MEMORY in statuses:
            _give_up(outcome, is_shared=ranks.size > 1)
            errors.append(outcome.error or OutOfMemory(outcome.job.name))
        elif any(statuses):
            _require_equal(statuses)
            require_equal_weights(ranks, outcome.job)
    return errors


def require_equal_weights(ranks: Ranks, job: TrainingJob) -> None:
    """Raises RanksDiffer, on all ranks, unless all of them have the same bits in the job's vectors."""
    if ranks.size > 1 and not job.is_torn:
        _require_equal(ranks.numbers(job.adapter.bit_sums()))


def _give_up(outcome: StepOutcome, *, is_shared: bool) -> None:
    """Compute nothing more of the job. Of several ranks (`is_shared`) some may have updated its vectors and others not:
    then they are of no step, and all ranks report the step before."""
    outcome.job.quarantine()
    if is_shared:
        del outcome.job.pending[outcome.num_pending :]
        outcome.job.is_torn = True
        outcome.job.progress.step = outcome.step


def _require_equal(of_ranks: Sequence[Any]) -> None:
    differing = [rank for rank, own in enumerate(of_ranks) if own != of_ranks[0]]
    if differing:
        raise RanksDiffer(differing)
