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
    """Priority class of a job, as stored. Lower values train first."""

    urgent = 0
    normal = 1
    batch = 2


class JobState(StrEnum):
    """State of a job. For a running job, cancel and pause are flags until its worker has applied them."""

    VALIDATING_FILES = "validating_files"
    """Accepted; a worker tokenizes its files. Enters: create, resume. Leaves: prepared, refused, cancel, pause."""
    QUEUED = "queued"
    """Ready to train and waiting for a trainer. A retry is `queued` with `run_after` in the future."""
    RUNNING = "running"
    """Held by one claim. Leaves: verbs of that claim, or recovery after its lease or its worker has ended."""
    PAUSED = "paused"
    """Stopped by a user, with its last checkpoint kept. Leaves: resume, cancel."""
    SUCCEEDED = "succeeded"
    """Its adapter is stored, and PEFT has reproduced the logits of training with it."""
    FAILED = "failed"
    """Failed for the reason in its row."""
    CANCELLED = "cancelled"
    """Cancelled by a user, or stopped as a trial by its sweep."""


FINAL_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
UNFINISHED_STATES = frozenset(JobState) - FINAL_STATES
"""Queries name these states, so that an index finds the rows. A query for "not final" would scan all jobs."""


class Verb(StrEnum):
    """Actions that change a job's state. Users call the first four, and workers and recovery call the others.

    A resumed job whose files are already prepared is `prepared` in the same request.
    """

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
"""All allowed transitions; any other pair is rejected. A resumed job passes through `validating_files` again, which
is a single lookup if its files are already prepared."""


class EndReason(StrEnum):
    """Reason why an attempt ended."""

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
    """Consequences of an EndReason for the job, and its possible causes."""

    state: JobState
    retryable: bool = False
    """While the job has attempts left, it returns to the queue instead of taking `state`."""
    counts: bool = True
    """The attempt counts toward quarantine. Drains, preemptions and pauses do not count. A lost worker does not count
    either, but MAX_LOSSES limits how many a job may lose in a row."""
    is_bad: bool = False
    """The end was a failure, not requested by a user or operator, and the job is retried."""
    may_be_nodes: bool = False
    """The node may be at fault. This excludes `infra_lost`, because a database outage loses every worker. It also
    excludes `sharded_oom`: a base model is sharded if memory is scarce, so a pack that is too large is not a device
    fault."""
    may_be_bases: bool = False
    """The base model may be at fault if the trainer never became ready."""
    is_of_memory: bool = False

    @property
    def is_counted(self) -> bool:
        """The attempt counts toward the limit at which the job is quarantined."""
        return self.retryable and self.counts


_again = partial(Ending, state=JobState.FAILED, retryable=True)
"""An ending after which the job is retried; it becomes `failed` only after too many of them."""

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
    """Return the reasons whose ending satisfies `which`."""
    return frozenset(reason for reason, ending in ENDINGS.items() if which(ending))


MAX_COUNTED_ATTEMPTS = 3
"""A job with this many counted attempts since its last new checkpoint is quarantined as `failed`."""
MAX_LOSSES = 10
"""A job is also quarantined after this many failures in a row that are not attributed to it: its worker was lost, or
its trainer exited before it had started the job. Without this limit, the job would be retried forever."""


MAX_ENDS_IN_COMPANY = 2
"""A job trains alone after this many trainers or workers have failed while they held it, counted since its last new
checkpoint."""


def is_suspect(counted_attempts: int, lost_attempts: int) -> bool:
    """Return whether a job must train alone, so that its failures affect no packmate and are not attributed to one."""
    return counted_attempts + lost_attempts >= MAX_ENDS_IN_COMPANY


def next_state(state: JobState | None, verb: Verb) -> JobState | None:
    """Return the state after `verb`; None if the verb is not allowed in `state`."""
    return TRANSITIONS.get((state, verb))
