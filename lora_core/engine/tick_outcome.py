# pyright: basic
"""What a tick has done to a job on one rank, which all ranks compare before it counts."""

from dataclasses import dataclass
from enum import IntEnum

from lora_core.engine.job import Job
from lora_core.errors import OutOfMemory
from lora_core.events import JobDiverged


class Outcome(IntEnum):
    """Of a tick, for one job on one rank: what ranks compare."""

    WELL = 0
    SHORT = 1
    """Of memory, while a step was booked."""
    DIVERGED = 2
    DIVERGED_AFTER_GOOD_STEP = 3


@dataclass(kw_only=True, slots=True)
class Booked:
    """What a tick has done to a job, on this rank; `step` and `num_pending` are of before."""

    job: Job
    step: int
    num_pending: int
    shortage: OutOfMemory | None = None

    @property
    def outcome(self) -> Outcome:
        if self.shortage is not None:
            return Outcome.SHORT
        for event in self.job.pending[self.num_pending :]:
            if isinstance(event, JobDiverged):
                return Outcome.DIVERGED_AFTER_GOOD_STEP if event.good_step == event.step else Outcome.DIVERGED
        return Outcome.WELL

    def given_up(self, *, is_shared: bool) -> OutOfMemory:
        """Why the job computes nothing more. is_shared: by several ranks, of which some may have updated the row and
        others not: nothing can be made of its weights, and the step is the one before on all."""
        self.job.quarantine()
        if is_shared:
            del self.job.pending[self.num_pending :]
            self.job.is_torn = True
            self.job.progress.step = self.step
        return self.shortage or OutOfMemory(self.job.name)
