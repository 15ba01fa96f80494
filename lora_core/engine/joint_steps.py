# pyright: basic
"""Takes the AdamW steps of all jobs of a tick on a GPU in a few kernel launches.

A CPU measures and takes the step of each job separately (job.py). So does a GPU with the steps of SGD and Adafactor.
"""

from collections.abc import Sequence

import torch

from lora_core.adapter.optimizer import StepSizes, joint_step_sizes, joint_steps
from lora_core.engine.job import TrainingJob
from lora_core.engine.rank_agreement import StepOutcome
from lora_core.errors import OutOfMemory
from lora_core.runtime.device_errors import shortage_named, shortage_of


def measure_together(outcomes: Sequence[StepOutcome]) -> None:
    """Set the sizes of all steps that are due and not measured yet. If memory runs out, each job is measured alone."""
    received = [outcome for outcome in outcomes if outcome.error is None]
    due = [outcome for outcome in received if outcome.job.is_due and outcome.job.sizes is None]
    if not due:
        return
    try:
        with shortage_named():
            sizes_J3 = joint_step_sizes([outcome.job.adapter for outcome in due])
    except torch.OutOfMemoryError:
        if len(due) == 1:
            _fail(due)
        for one in due if len(due) > 1 else ():
            measure_together([one])
        return
    for outcome, sizes_3 in zip(due, sizes_J3, strict=True):
        outcome.job.sizes = sizes_3


def step_together(due: Sequence[tuple[StepOutcome, StepSizes]]) -> None:
    """Take the steps of these jobs. Call it where an interrupt waits.

    Before the launch a failure changes no weights. If memory runs out there, each job takes its step alone. After it,
    the failure marks each job torn whose step is not complete, because its vectors are in an unknown state.
    """
    ready = [(outcome, sizes) for outcome, sizes in due if _is_possible(outcome, sizes)]
    if not ready:
        return
    try:
        with shortage_named():
            launches = joint_steps([outcome.job.joint_step(sizes) for outcome, sizes in ready])
    except torch.OutOfMemoryError:
        if len(ready) == 1:
            _fail([outcome for outcome, _ in ready])
        for one in ready if len(ready) > 1 else ():
            step_together([one])
        return
    incomplete: list[TrainingJob] = [outcome.job for outcome, _ in ready]
    try:
        with shortage_named():
            for launch in launches:
                launch()
        for outcome, sizes in ready:
            _complete(outcome, sizes)
            incomplete.pop(0)
    except BaseException as error:
        for job in incomplete:
            job.tear()
        if not isinstance(error, torch.OutOfMemoryError):
            raise
        _fail([outcome for outcome, _ in ready if outcome.job in incomplete])


def _is_possible(outcome: StepOutcome, sizes: StepSizes) -> bool:
    """Return whether the job can take the step. Otherwise it has diverged or failed."""
    try:
        with shortage_of(outcome.job.name):
            events = outcome.job.refuse_step(sizes)
    except OutOfMemory as error:
        outcome.error = error
        return False
    outcome.job.pending += events
    return not events


def _complete(outcome: StepOutcome, sizes: StepSizes) -> None:
    job = outcome.job
    try:
        with shortage_of(job.name):
            with job.updating():
                job.adapter.refresh_derived()
            job.pending += job.complete_step(sizes)
    except OutOfMemory as error:
        outcome.error = error


def _fail(outcomes: Sequence[StepOutcome]) -> None:
    for outcome in outcomes:
        outcome.error = OutOfMemory(outcome.job.name)
