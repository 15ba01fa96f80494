# pyright: basic
"""Compares the state of jobs between ranks: the outcome of every step after each tick, and the weights of a job.

All ranks have the same jobs and compute the same updates, so a job fails on all of them or on none. A difference
proves a fault of a device, its memory or the network.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch

from lora_core.adapter.optimizer import StepSizes
from lora_core.distributed.ranks import Ranks
from lora_core.engine.job import TrainingJob
from lora_core.errors import LoraCoreError, OutOfMemory, RanksDiffer
from lora_core.events import JobDiverged
from lora_core.layers.activation_checkpointing import ActivationMemory
from lora_core.runtime.device_errors import shortage_named, shortage_of
from lora_core.runtime.transfers import download


class StepStatus(IntEnum):
    """Outcome of a tick for one job on one rank."""

    GOOD = 0
    OUT_OF_MEMORY = 1
    """Out of memory during the job's update."""
    DIVERGED = 2
    DIVERGED_AFTER_GOOD_STEP = 3


@dataclass(kw_only=True, slots=True)
class StepOutcome:
    """Effect of a tick on a job on this rank. `step` and `num_pending` (events) are the values before the update."""

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


def read_sizes(ranks: Ranks, outcomes: Sequence[StepOutcome]) -> list[StepSizes | None]:
    """Return the sizes of each job's step on the host; None for a job whose step is not due or that has failed here.

    The norm is the leader's on all ranks. All have the same gradient, but a device adds up its squares in an order that
    depends on its model, and the last bit of the norm would scale the gradient differently. Where a norm is not finite,
    or is missing because the job has failed, a rank keeps its own, so that `agree` finds the difference.
    """
    due = [outcome.job.sizes if outcome.error is None else None for outcome in outcomes]
    try:
        with shortage_named():
            read = iter(download([sizes for sizes in due if sizes is not None]))
        own = [None if sizes is None else StepSizes.of(next(read)) for sizes in due]
    except torch.OutOfMemoryError:  # the other ranks wait for the numbers of this one
        own = [None for _ in due]
        for outcome, sizes in zip(outcomes, due, strict=True):
            if sizes is not None:
                outcome.error = OutOfMemory(outcome.job.name)
    norms = ranks.leader_numbers([math.nan if sizes is None else sizes.norm for sizes in own])
    return [
        replace(sizes, norm=norm) if sizes is not None and math.isfinite(norm) and math.isfinite(sizes.norm) else sizes
        for sizes, norm in zip(own, norms, strict=True)
    ]


def continue_start(ranks: Ranks, job: TrainingJob, work: int) -> None:
    """Continue the initialization of a job on all ranks. See `TrainingJob.continue_initialization`.

    At the end all ranks take over the leader's weights, because decompositions and norms have other bits on a device of
    another model. If it raises, it raises on all ranks, and the initialization starts again. Raises OutOfMemory.
    """
    if job.starting is None:
        return
    try:
        with ranks.sharing_errors(), shortage_of(job.name, part="start"):
            job.continue_initialization(work)
        if ranks.size > 1 and job.starting is None:
            ranks.spread(job.adapter.p, holder=0)
            with ranks.sharing_errors(), shortage_of(job.name, part="start"):
                job.adapter.derive_start()
    except LoraCoreError:
        job.restart_initialization()
        raise


def agree(ranks: Ranks, outcomes: Sequence[StepOutcome], activations: ActivationMemory) -> list[OutOfMemory]:
    """Compare the outcomes of a tick on all ranks, and limit later ticks to the rank with the least memory.

    Returns one error for each job whose update ran out of memory on any rank; every rank has quarantined it. After a
    step whose sums depend on the device, all ranks take over the leader's. Raises RanksDiffer on all ranks if a job did
    not diverge on all of them in the same way and from the same weights.
    """
    # One exchange carries both because each costs a round trip per tick.
    own = activations.own_memory() if ranks.size > 1 else (0, 0)
    of_ranks = ranks.numbers([*own, *(outcome.status for outcome in outcomes)])
    activations.adopt_ranks(own, [(free_bytes, per_token) for free_bytes, per_token, *_ in of_ranks])
    errors: list[OutOfMemory] = []
    for number, outcome in enumerate(outcomes, start=len(own)):
        statuses = [of_rank[number] for of_rank in of_ranks]
        if StepStatus.OUT_OF_MEMORY in statuses:
            _quarantine(outcome, is_shared=ranks.size > 1)
            errors.append(outcome.error or OutOfMemory(outcome.job.name))
        elif any(statuses):
            _require_equal(statuses)
            require_equal_weights(ranks, outcome.job)
        elif ranks.size > 1 and outcome.job.step > outcome.step and outcome.job.step_adds_on_device:
            errors += _take_over_step(ranks, outcome)
    return errors


def require_equal_weights(ranks: Ranks, job: TrainingJob) -> None:
    """Raise RanksDiffer on all ranks unless all of them have the same bits in the job's vectors."""
    if ranks.size > 1 and not job.is_torn:
        _require_equal(ranks.numbers(job.adapter.bit_sums()))


def _take_over_step(ranks: Ranks, outcome: StepOutcome) -> list[OutOfMemory]:
    """Give all ranks the leader's weights and state after a step. Returns an error if memory runs out on any."""
    job = outcome.job
    ranks.spread(job.adapter.p, holder=0)
    ranks.spread(job.adapter.v, holder=0)
    try:
        with ranks.sharing_errors(), shortage_of(job.name):
            job.adapter.refresh_compute()
    except LoraCoreError:
        _quarantine(outcome, is_shared=True)
        return [OutOfMemory(job.name)]
    return []


def _quarantine(outcome: StepOutcome, *, is_shared: bool) -> None:
    """Stop computing the job.

    With several ranks (`is_shared`) some may have updated its vectors and others not. The vectors then belong to no
    step, so all ranks report the step before.
    """
    outcome.job.quarantine()
    if is_shared:
        del outcome.job.pending[outcome.num_pending :]
        outcome.job.is_torn = True
        outcome.job.progress.step = outcome.step


def _require_equal(of_ranks: Sequence[Any]) -> None:
    differing = [rank for rank, own in enumerate(of_ranks) if own != of_ranks[0]]
    if differing:
        raise RanksDiffer(differing)
