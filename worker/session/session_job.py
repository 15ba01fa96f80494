"""The state that the worker keeps in memory about one job of its trainer: its curve until the database has it, and the
end of its attempt."""

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

FLUSH_SECONDS = 0.5
"""Limits the writes of a job to two per second, however fast its steps are."""
MAX_POINTS = 200
WINDOW_STEPS = 50
LAST_STEPS = 5
"""Number of steps whose mean loss is the final loss, because a single batch may be a hard one."""
RISEN = 1.2
JUMPED = 1.5
"""Threshold for trainings that are too short for a meaningful mean, because batches differ."""
TRAIN_FIELDS = ("loss", "token_accuracy", "learning_rate", "grad_norm", "num_tokens", "rewards")


@dataclass(kw_only=True, slots=True)
class Curve:
    """Collects one job's `stepped` and `evaluated` events."""

    num_steps: int
    steps_per_epoch: float | None = None
    """None until the trainer has admitted the job."""
    step: int = 0
    loss: float | None = None
    _points: list[Json] = field(default_factory=list[Json])
    _window: deque[tuple[float, int]] = field(default_factory=lambda: deque[tuple[float, int]](maxlen=WINDOW_STEPS))
    _last_losses: deque[float] = field(default_factory=lambda: deque[float](maxlen=LAST_STEPS))
    _flushed_at: float = 0.0

    def stepped(self, event: Json) -> None:
        self.step, self.loss = event["step"], event["loss"]
        self._last_losses.append(event["loss"])
        self._window.append((event["seconds"], event["num_tokens"]))
        self._points.append(
            {"kind": "train", "step": event["step"], **{name: event.get(name) for name in TRAIN_FIELDS}}
        )

    def evaluated(self, event: Json) -> None:
        self._points.append(
            {
                "kind": "valid",
                "step": event["step"],
                "loss": event["loss"],
                "token_accuracy": event["token_accuracy"],
                "num_tokens": event["num_supervised_tokens"],
                "rewards": event.get("rewards"),
            }
        )

    def is_due(self, now: float) -> bool:
        """now: the reader's monotonic clock, in seconds."""
        waited = now - self._flushed_at >= FLUSH_SECONDS
        return bool(self._points) and (waited or len(self._points) >= MAX_POINTS)

    def points(self) -> list[Json]:
        """Return the points that have not been written yet."""
        return list(self._points)

    def written(self, num_points: int, now: float) -> None:
        del self._points[:num_points]
        self._flushed_at = now

    def risen(self, began: tuple[int, float] | None) -> tuple[float, float] | None:
        """Return the first loss and the mean of the last ones, if the mean is clearly higher; else None.

        began: step and loss of the job's first recorded step, which may belong to an earlier attempt. A loss that rose
        by the factor JUMPED is reported for any number of steps.
        """
        if began is None or self.step <= began[0]:
            return None
        losses = list(self._last_losses)[-min(LAST_STEPS, self.step - began[0]) :]
        if not losses:
            return None
        first, last = began[1], sum(losses) / len(losses)
        is_long = self.step - began[0] >= 2 * LAST_STEPS and len(losses) == LAST_STEPS
        return (first, last) if last > (RISEN if is_long else JUMPED) * first else None

    def progress(self) -> Json:
        """Return the progress for the job's row, with its own speed over the last steps and the remaining time."""
        speed: Json = {"tokens_per_second": None, "seconds_left": None}
        if len(self._window) >= 2:
            seconds = max(1e-6, self._window[-1][0] - self._window[0][0])
            num_tokens = sum(num_tokens for _, num_tokens in self._window) - self._window[0][1]
            step_seconds = seconds / (len(self._window) - 1)
            speed = {
                "tokens_per_second": round(num_tokens / seconds, 1),
                "seconds_left": round((self.num_steps - self.step) * step_seconds, 1),
            }
        epoch = round(self.step / self.steps_per_epoch, 3) if self.steps_per_epoch else None
        return {"step": self.step, "num_steps": self.num_steps, "epoch": epoch, "loss": self.loss, **speed}


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
