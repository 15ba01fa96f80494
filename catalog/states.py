"""The states of a job, the transitions between them, and the end reasons of attempts.

The API uses the same names. Only `catalog.lifecycle.transitions.move` writes a state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from functools import partial
from typing import Literal

Priority = Literal["urgent", "normal", "batch"]


class PriorityClass(IntEnum):
    """Stored order: the lower trains first."""

    urgent = 0
    normal = 1
    batch = 2


class JobState(StrEnum):
    """Where a job is. Cancel and pause are flags on a running job until its worker has obeyed."""

    VALIDATING_FILES = "validating_files"
    """Accepted; a worker tokenizes its files. Enters: create. Leaves: prepared, failed, cancelled, paused."""
    QUEUED = "queued"
    """Ready to train and waiting for room. A retry is `queued` with `run_after` in the future."""
    RUNNING = "running"
    """Held by one claim. Leaves by the verbs of that claim, or by recovery when its lease has expired."""
    PAUSED = "paused"
    """Stopped by a person, with its last checkpoint kept. Leaves: resume, cancel."""
    SUCCEEDED = "succeeded"
    """Its adapter is stored, and PEFT gave the logits that training saw."""
    FAILED = "failed"
    """Ended for the reason on its record."""
    CANCELLED = "cancelled"
    """Ended by a person, or as a trial that its sweep has stopped."""


FINAL_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
UNFINISHED_STATES = frozenset(JobState) - FINAL_STATES
"""Asked for by name they are found by an index; all that aren't final would be looked for among all there ever were."""
CLAIMED_STATES = frozenset({JobState.VALIDATING_FILES, JobState.RUNNING})
"""Of a job that somebody holds: only in these has it a claim."""


class Verb(StrEnum):
    """What moves a job. Users call the first four; workers and recovery call the others."""

    CREATE = "create"
    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    PREPARED = "prepared"
    REFUSED = "refused"
    CLAIM = "claim"
    RELEASE = "release"
    REQUEUE = "requeue"
    APPLY_PAUSE = "apply_pause"
    APPLY_CANCEL = "apply_cancel"
    COMPLETE = "complete"
    FAIL = "fail"


TRANSITIONS: dict[tuple[JobState | None, Verb], JobState] = {
    (None, Verb.CREATE): JobState.VALIDATING_FILES,
    (JobState.VALIDATING_FILES, Verb.PREPARED): JobState.QUEUED,
    (JobState.VALIDATING_FILES, Verb.REFUSED): JobState.FAILED,
    (JobState.VALIDATING_FILES, Verb.CANCEL): JobState.CANCELLED,
    (JobState.VALIDATING_FILES, Verb.PAUSE): JobState.PAUSED,
    (JobState.QUEUED, Verb.CLAIM): JobState.RUNNING,
    (JobState.QUEUED, Verb.CANCEL): JobState.CANCELLED,
    (JobState.QUEUED, Verb.PAUSE): JobState.PAUSED,
    (JobState.RUNNING, Verb.RELEASE): JobState.QUEUED,
    (JobState.RUNNING, Verb.REQUEUE): JobState.QUEUED,
    (JobState.RUNNING, Verb.APPLY_PAUSE): JobState.PAUSED,
    (JobState.RUNNING, Verb.APPLY_CANCEL): JobState.CANCELLED,
    (JobState.RUNNING, Verb.COMPLETE): JobState.SUCCEEDED,
    (JobState.RUNNING, Verb.FAIL): JobState.FAILED,
    (JobState.PAUSED, Verb.RESUME): JobState.VALIDATING_FILES,
    (JobState.PAUSED, Verb.CANCEL): JobState.CANCELLED,
}
"""Every move there is. A pair that is not here is refused. (A resumed job passes through
`validating_files` again: where its files are prepared already, that is one look-up.)"""


class EndReason(StrEnum):
    """Why an attempt ended."""

    COMPLETED = "completed"
    CANCELLED_BY_USER = "cancelled_by_user"
    PRUNED = "pruned"
    PAUSED_BY_USER = "paused_by_user"
    USER_ERROR = "user_error"
    DIVERGED = "diverged"
    CUDA_OOM = "cuda_oom"
    HOST_OOM = "host_oom"
    SHARDED_OOM = "sharded_oom"
    TRAINER_CRASHED = "trainer_crashed"
    TIMEOUT = "timeout"
    VERIFICATION_FAILED = "verification_failed"
    INFRA_LOST = "infra_lost"
    NODE_FAILED = "node_failed"
    GANG_INCOMPLETE = "gang_incomplete"
    DRAINED = "drained"
    PREEMPTED = "preempted"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """What an EndReason means for the job, and of whom it tells."""

    state: JobState
    retryable: bool = False
    """The job goes back to the queue instead, while it has attempts left."""
    counts: bool = True
    """The attempt counts towards quarantine. A drain, a preemption or a pause is nobody's fault. Nor is a lost worker,
    as long as it is not one after the other: MAX_LOSSES."""
    is_bad: bool = False
    """Nobody had asked for it, and the job is tried again."""
    may_be_nodes: bool = False
    """It may be the node's doing. Not `infra_lost`: in an outage of the database every worker is lost. Nor
    `sharded_oom`: a base is divided where memory is scarce, and a pack too large for it is no device's fault."""
    may_be_bases: bool = False
    """It may be the base's doing, where its trainer never got ready."""
    is_of_memory: bool = False

    @property
    def is_counted(self) -> bool:
        """It brings the job nearer to quarantine."""
        return self.retryable and self.counts


_again = partial(Ending, state=JobState.FAILED, retryable=True)
"""`failed` only after there have been too many such ends."""

ENDINGS: dict[EndReason, Ending] = {
    EndReason.COMPLETED: Ending(state=JobState.SUCCEEDED),
    EndReason.CANCELLED_BY_USER: Ending(state=JobState.CANCELLED),
    EndReason.PRUNED: Ending(state=JobState.CANCELLED),
    EndReason.PAUSED_BY_USER: Ending(state=JobState.PAUSED, counts=False),
    EndReason.USER_ERROR: Ending(state=JobState.FAILED),
    EndReason.DIVERGED: Ending(state=JobState.FAILED),
    EndReason.VERIFICATION_FAILED: Ending(state=JobState.FAILED),
    EndReason.CUDA_OOM: _again(is_bad=True, may_be_nodes=True, may_be_bases=True, is_of_memory=True),
    EndReason.HOST_OOM: _again(is_bad=True, may_be_nodes=True, may_be_bases=True, is_of_memory=True),
    EndReason.SHARDED_OOM: _again(is_bad=True, may_be_bases=True, is_of_memory=True),
    EndReason.TRAINER_CRASHED: _again(is_bad=True, may_be_nodes=True, may_be_bases=True),
    EndReason.TIMEOUT: _again(is_bad=True, may_be_nodes=True, may_be_bases=True),
    EndReason.NODE_FAILED: _again(is_bad=True, may_be_nodes=True),
    EndReason.INFRA_LOST: _again(counts=False, is_bad=True),
    EndReason.GANG_INCOMPLETE: _again(counts=False),
    EndReason.DRAINED: _again(counts=False),
    EndReason.PREEMPTED: _again(counts=False),
}


def reasons(which: Callable[[Ending], bool]) -> frozenset[EndReason]:
    """Those whose ending is such."""
    return frozenset(reason for reason, ending in ENDINGS.items() if which(ending))


MAX_COUNTED_ATTEMPTS = 3
"""A job that ends its trainer this often without a new checkpoint in between is quarantined as `failed`."""
MAX_LOSSES = 10
"""So is one that ended badly this often in a row by no doing of its own, as far as can be seen: its worker went away,
or its trainer ended before it had begun the job. It would go round for ever."""


MAX_ENDS_IN_COMPANY = 2
"""A job with which so many trainers or workers have ended since its last new checkpoint trains alone from then on."""


def is_suspect(counted_attempts: int, lost_attempts: int) -> bool:
    """Whether a job trains alone, so that no packmate is hurt or blamed."""
    return counted_attempts + lost_attempts >= MAX_ENDS_IN_COMPANY


def next_state(state: JobState | None, verb: Verb) -> JobState | None:
    """Where `verb` takes a job that is in `state`; None if it may not be done."""
    return TRANSITIONS.get((state, verb))
