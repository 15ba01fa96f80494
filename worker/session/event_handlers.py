"""Handles a trainer's events about one job: records them, and decides what happens to the job.

An event may be handled twice: if the database becomes unavailable in the middle, the same event is handled again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

from catalog import tracing
from catalog.error_texts import ErrorText
from catalog.history import queries
from catalog.lifecycle import recording
from catalog.queue import claims
from catalog.states import EndReason
from catalog.tables.table import Json
from worker.context.context import WorkerContext
from worker.protocol.mailbox import MalformedEvent, TrainerDirectory
from worker.session import publishing, staging
from worker.session.base_load import reason_for, strategy_for
from worker.session.session_job import End, SessionJob, folders_of

RETRYABLE_CODES = {
    "out_of_memory": EndReason.CUDA_OOM,
    "out_of_space": EndReason.NODE_FAILED,
    "disk_error": EndReason.NODE_FAILED,
    "device_unusable": EndReason.NODE_FAILED,
}

DIVERGED_DETAIL = "training from its weights diverged."
NONE_IS_GOOD = "The job has no checkpoint with good weights."


class Next(Enum):
    """The next step if the attempt does not fail."""

    CONTINUE = "keep training"
    HAND_OVER = "hand over again"
    COMPLETED = "completed"


class EventHandlers:
    """Handles the events of one trainer's jobs, except the points of their curves: see trainer_session.py."""

    def __init__(self, context: WorkerContext, directory: TrainerDirectory, trainer_id: str) -> None:
        self._context = context
        self._directory = directory
        self._trainer_id = trainer_id
        self._publishers: dict[str, Callable[[SessionJob, Json, Json], End | Next]] = {
            "checkpointed": self._checkpointed,
            "paused": self._paused,
            "exported": self._exported,
        }
        self._followers: dict[str, Callable[[SessionJob, Json], End | Next]] = {
            "admitted": self._admitted,
            "checkpoint_failed": self._checkpoint_failed,
            "checkpoint_unexported": self._checkpoint_unexported,
            "finished": self._finished,
            "sampled": self._sampled,
            "unsampled": self._unsampled,
            "cancelled": self._cancelled,
            "diverged": self._diverged,
            "refused": self._refused,
        }

    def follow(self, held: SessionJob, event: Json, *, ready: Json | None) -> End | Next:
        """Handle an event. Returns how the attempt ends, or the next step. ready: the trainer's `ready` event.

        Raises StaleClaim, OutOfSpace, Unavailable.
        """
        if "spans" in event:  # removed, so that they are not recorded again if the event is handled again
            self._context.spans.reported(held.claim.claim_id, event)
            del event["spans"]
        publisher = self._publishers.get(event["type"])
        if publisher is not None:
            if ready is None:
                raise MalformedEvent(f"is a {event['type']!r} event before the trainer was ready")
            return publisher(held, event, ready)
        follower = self._followers.get(event["type"])
        return follower(held, event) if follower else Next.CONTINUE

    def refusal(self, error: Json) -> End:
        """Return how the attempt of a job ends that the trainer has refused. error: code, message, remedy."""
        reason = RETRYABLE_CODES.get(error["code"], EndReason.USER_ERROR)
        if reason is EndReason.CUDA_OOM and self._context.device.kind == "cpu":
            reason = EndReason.HOST_OOM
        return End(reason=reason, detail=error["message"], error=ErrorText(**error).as_job_error())

    def load_refusal(self, error: Json, ranks: Sequence[int]) -> End:
        """Return how the attempts end when the trainer can't load its base model.

        The cause may be the base model or the node, whose device or copy of the files may differ from other nodes'.
        Therefore the jobs are retried until catalog.lifecycle.failures has found the cause. ranks: the processes that
        failed.
        """
        reason = self.refusal(error).reason
        led = self._context.led_round
        workers = [] if led is None else sorted({led.worker_of(rank) for rank in ranks})
        location = f", on {' and '.join(workers)} of the gang" if workers else ""
        origin = f"Process {' and '.join(map(str, ranks))}{location}: " if ranks else ""
        return End(
            reason=EndReason.TRAINER_CRASHED if reason is EndReason.USER_ERROR else reason,
            detail=f"{origin}{error['message']} {error['remedy']}",
            blamed_worker_id=workers[0] if len(workers) == 1 else None,
        )

    def _admitted(self, held: SessionJob, event: Json) -> Next:
        step = event["step"]
        held.curve.step, held.curve.steps_per_epoch = step, event["steps_per_epoch"]
        claims.started(
            self._context.db,
            held.claim.claim_id,
            trainer_id=self._trainer_id,
            resumed_from_step=step or None,
            strategy=self._strategy(held) if self._context.num_processes > 1 else None,
        )
        held.is_admitted = True
        self._context.spans.admitted(held.claim.claim_id, step=step)
        return Next.CONTINUE

    def _strategy(self, held: SessionJob) -> tuple[str, Json]:
        """Return how the devices hold the job's base model, and the reason: a sentence and its data."""
        why, job = reason_for(self._context, held.claim.job), held.claim.job
        strategy = strategy_for(self._context, job)
        data = {"strategy": strategy, "num_devices": self._context.num_processes}
        return f"Strategy {strategy}. {why}", data

    def _checkpointed(self, held: SessionJob, event: Json, ready: Json) -> Next:
        """Publish a checkpoint. The trainer's copies are deleted only after it is recorded."""
        if held.recorded_step < event["step"]:
            publishing.checkpoint(self._context, held.claim, self._directory, event, trainer=ready)
            held.recorded_step = event["step"]
        for folder in folders_of(event):
            self._directory.delete(held.claim.claim_id, folder)
        return Next.CONTINUE

    def _checkpoint_failed(self, held: SessionJob, event: Json) -> Next:
        message = f"{event['error']['message']} No checkpoint was written."
        recording.record_event(self._context.db, held.claim.claim_id, "warn", message)
        return Next.CONTINUE

    def _checkpoint_unexported(self, held: SessionJob, event: Json) -> Next:
        publishing.no_model(self._context, held.claim, step=event["step"], reason=event["error"]["message"])
        return Next.CONTINUE

    def _finished(self, held: SessionJob, event: Json) -> Next:
        """Record the end of training. The progress shows an early stop while the adapter is verified."""
        self._context.spans.finished(held.claim.claim_id)
        progress = held.curve.progress() | {"stopped_early": event["stopped_early"]}
        recording.record_progress(self._context.db, held.claim.claim_id, progress)
        if event["kept_step"] == event["step"]:  # else better weights of an earlier step were kept
            self._warn_if_loss_rose(held)
        return Next.CONTINUE

    def _warn_if_loss_rose(self, held: SessionJob) -> None:
        job = held.claim.job
        risen = held.curve.risen(queries.first_step(self._context.db, project_id=job.project_id, job_id=job.id))
        if risen is not None:
            message = "The training loss ended at {1:.3g}, above its initial value of {0:.3g}.".format(*risen)
            remedy = "Test the adapter before you use it, and try a lower learning rate."
            recording.record_event(self._context.db, held.claim.claim_id, "warn", f"{message} {remedy}")

    def _sampled(self, held: SessionJob, event: Json) -> Next:
        samples = event["samples"]
        number = "1 answer" if len(samples) == 1 else f"{len(samples)} answers"
        data = {"step": event["step"], "samples": samples}
        message = f"Step {event['step']}: {number} to the job's prompts"
        recording.record_event(self._context.db, held.claim.claim_id, "info", message, data)
        return Next.CONTINUE

    def _unsampled(self, held: SessionJob, event: Json) -> Next:
        message = f"Step {event['step']}: the job's prompts were not answered. {event['error']['message']}"
        recording.record_event(self._context.db, held.claim.claim_id, "warn", message)
        return Next.CONTINUE

    def _paused(self, held: SessionJob, event: Json, ready: Json) -> End:
        publishing.model_of_checkpoint(self._context, held.claim, self._directory, event, trainer=ready)
        if "pause" in held.sent:
            return End(reason=EndReason.PAUSED_BY_USER, detail=f"Paused at step {event['step']}.")
        if "preempt" in held.sent:
            return End(reason=EndReason.PREEMPTED, detail=f"Saved at step {event['step']}.")
        return End(reason=EndReason.DRAINED, detail=f"The worker shut down; the job was saved at step {event['step']}.")

    def _cancelled(self, held: SessionJob, event: Json) -> End:
        return End(reason=EndReason.CANCELLED_BY_USER, detail="Cancelled.")

    def _diverged(self, held: SessionJob, event: Json) -> End:
        text = ErrorText.of("diverged", detail=event["message"], param="optimizer.learning_rate")
        message = f"{text.sentence()} {self._usable_checkpoint(held, event)}"
        return End(
            reason=EndReason.DIVERGED, detail=event["message"], error={**text.as_job_error(), "message": message}
        )

    def _usable_checkpoint(self, held: SessionJob, event: Json) -> str:
        """Return a sentence about the newest checkpoint with good weights. Newer ones, whose weights were ruined before
        they were written, are marked as unusable."""
        job = held.claim.job
        rows = queries.checkpoints_page(self._context.db, project_id=job.project_id, job_id=job.id, limit=100).items
        kept = [row for row in rows if row.artifact is not None]
        good_step = -1 if event["good_step"] is None else event["good_step"]
        for row in kept:
            if row.step > good_step:
                recording.distrust_checkpoint(
                    self._context.db,
                    held.claim.claim_id,
                    checkpoint_id=row.id,
                    problem=f"{DIVERGED_DETAIL} {event['message']}",
                )
        steps = [row.step for row in kept if row.step <= good_step]
        return f"The checkpoint of step {max(steps)} is kept." if steps else NONE_IS_GOOD

    def _refused(self, held: SessionJob, event: Json) -> End | Next:
        if event["is_checkpoint"] and held.checkpoints:
            staging.fall_back(self._context, held.claim, held.checkpoints, event["error"]["message"])
            return Next.HAND_OVER
        return self.refusal(event["error"])

    def _exported(self, held: SessionJob, event: Json, ready: Json) -> End | Next:
        report = event["report"]
        if not report["passed"]:
            message = (
                f"PEFT's logits differ from the training logits by {report['max_abs_diff']:.3g}, but the tolerance is "
                f"{report['tolerance']:.3g}. {report.get('explanation', '')}"
            ).rstrip()
            return End(reason=EndReason.VERIFICATION_FAILED, detail=message)
        claim_id = held.claim.claim_id
        about = {"job": held.claim.job.id, "claim": claim_id}
        with tracing.span("publish", parent=self._context.spans.of(claim_id), about=about):
            publishing.adapter(self._context, held.claim, self._directory, event, trainer=ready)
        return Next.COMPLETED
