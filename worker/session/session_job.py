"""The state that the worker keeps in memory about one job of its trainer, and the end of that job's attempt."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from catalog.lifecycle.recording import KEPT_CHECKPOINTS
from catalog.queue.claiming import Claim
from catalog.queue.claims import ClaimDirectives
from catalog.states import EndReason, is_suspect
from catalog.tables.history import Checkpoint
from catalog.tables.table import Json
from worker.protocol.mailbox import Verb
from worker.session.metrics_buffer import Curve


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """How an attempt ends: the reason decides what follows, the detail is for users."""

    reason: EndReason
    detail: str
    error: Json | None = None
    """Becomes the job's `error` if the job is not retried."""
    blamed_worker_id: str | None = None
    """The worker whose node may have caused it, if known. For None, see TrainerSession."""


STOPPED: dict[Verb, End] = {
    "cancel": End(reason=EndReason.CANCELLED_BY_USER, detail="Cancelled."),
    "pause": End(reason=EndReason.PAUSED_BY_USER, detail="Paused before training started on this worker."),
    "preempt": End(reason=EndReason.PREEMPTED, detail="Training had not started on this worker."),
}
"""How a request to stop ends the attempt if the trainer has nothing to save of the job."""


def requested_verb(directive: ClaimDirectives) -> Verb | None:
    """Return the request to stop that takes effect. A cancel takes precedence over a pause, and a pause over a
    preemption."""
    if directive.cancel:
        return "cancel"
    if directive.pause:
        return "pause"
    return "preempt" if directive.preempt else None


@dataclass(kw_only=True, slots=True)
class SessionJob:
    """One claim that the trainer works on."""

    claim: Claim
    curve: Curve
    checkpoints: list[Checkpoint]
    """Newest first. The trainer resumes from the first one."""
    is_handed_over: bool = False
    """The trainer has its files and the `admit` message."""
    is_admitted: bool = False
    """The trainer has allocated its memory."""
    is_to_stop: bool = False
    """Its sweep has pruned this trial because of its metrics."""
    sent: set[Verb] = field(default_factory=set[Verb])
    """Messages that were sent since the job was handed over."""
    pending_events: deque[Json] = field(default_factory=deque[Json])
    """Events of the trainer about the job that are not recorded yet. Empty except in an outage."""
    superseded: list[str] = field(default_factory=list[str])
    """Folders to be deleted: newer checkpoints superseded them before they were recorded."""
    recorded_step: int = 0
    """The step of the newest checkpoint that this attempt has recorded."""

    @property
    def is_suspect(self) -> bool:
        """Whether the job must train alone, because earlier attempts failed. This ends with its next checkpoint."""
        job = self.claim.job
        return not self.recorded_step and is_suspect(job.counted_attempts, job.lost_attempts)

    def drop_outdated(self) -> None:
        """Remove the unrecorded checkpoints that newer ones have superseded."""
        saved = [event for event in self.pending_events if event["type"] == "checkpointed"]
        for event in saved[:-KEPT_CHECKPOINTS]:
            self.pending_events.remove(event)
            self.superseded += folders_of(event)


def folders_of(checkpointed: Json) -> list[str]:
    """Return the folders in the trainer's directory that its checkpoint event names."""
    return [folder for name in ("folder", "adapter") if (folder := checkpointed.get(name)) is not None]
