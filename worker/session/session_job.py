"""What the worker keeps in memory about one job of its trainer, and how that job's attempt can end."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from catalog.lifecycle.recording import KEPT_CHECKPOINTS
from catalog.queue.claiming import Claim
from catalog.queue.claims import ClaimDirectives
from catalog.resources import requirements
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
    """The worker whose node may have caused it, if known. None: see TrainerSession."""


STOPPED: dict[Verb, End] = {
    "cancel": End(reason=EndReason.CANCELLED_BY_USER, detail="Cancelled."),
    "pause": End(reason=EndReason.PAUSED_BY_USER, detail="Paused before it trained here."),
    "preempt": End(reason=EndReason.PREEMPTED, detail="It had not begun to train here."),
}
"""How a request to stop ends the attempt if the trainer has nothing to save of the job."""


def requested_verb(directive: ClaimDirectives) -> Verb | None:
    """The request to stop that counts, if there are several. A cancel makes the others pointless."""
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
    """Newest first; the first is what the trainer resumes from."""
    is_handed_over: bool = False
    """Its files are with the trainer, and the message that says so."""
    is_admitted: bool = False
    """The trainer has made room for it."""
    is_to_stop: bool = False
    """By what it has measured: a trial that its sweep is better without."""
    sent: set[Verb] = field(default_factory=set[Verb])
    """Since it was handed over."""
    news: deque[Json] = field(default_factory=deque[Json])
    """What the trainer has said about it and is not on record yet. Empty but in an outage."""
    superseded: list[str] = field(default_factory=list[str])
    """Folders of checkpoints that newer ones have made needless before they were recorded. To be deleted."""
    recorded_step: int = 0
    """Of the newest checkpoint that this attempt has put on record."""

    @property
    def is_suspect(self) -> bool:
        """It trains alone, until it has a new checkpoint."""
        job = self.claim.job
        return not self.recorded_step and is_suspect(job.counted_attempts, job.lost_attempts)

    def own_bytes(self, description: Json, *, recomputes: bool) -> int:
        """What it takes in its trainer, beside its part of a tick. description: the base's. recomputes: the device."""
        return requirements.own_bytes(self.claim.job, description, recomputes=recomputes)

    def drop_outdated(self) -> None:
        """Take those checkpoints out of the news that newer ones have made needless."""
        saved = [event for event in self.news if event["type"] == "checkpointed"]
        for event in saved[:-KEPT_CHECKPOINTS]:
            self.news.remove(event)
            self.superseded += folders_of(event)


def folders_of(checkpointed: Json) -> list[str]:
    """Those of the trainer's directory that its event of a checkpoint names."""
    return [folder for name in ("folder", "adapter") if (folder := checkpointed.get(name)) is not None]
