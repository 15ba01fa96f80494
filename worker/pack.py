"""The jobs that one trainer holds: what is said to it about them, what it says, and how each ends.

Everything here is a function of an event and a claim; the loop around it is in supervise.py. An event is
taken off the queue only once its consequences are recorded, so that a database outage loses none.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from catalog import claims, workers
from catalog.artifacts.manifest import DamagedArtifact
from catalog.claims import Claim, Orders
from catalog.errors import LorryError, OutOfSpace, StaleClaim, Unavailable
from catalog.states import EndReason
from catalog.tables import Checkpoint, Json
from worker import admission, failpoints, publish
from worker.context import WorkerContext
from worker.curves import Curve
from worker.trainer_directory import EventReader, InboxWriter, TrainerDirectory, Verb

log = logging.getLogger(__name__)
RETRYABLE_CODES = {"out_of_memory": EndReason.CUDA_OOM, "out_of_space": EndReason.INFRA_LOST}
RETRYABLE_CODES["disk_error"] = EndReason.INFRA_LOST


@dataclass(kw_only=True, slots=True)
class Held:
    """One claim that the trainer works on."""

    claim: Claim
    curve: Curve
    checkpoints: list[Checkpoint]
    """Newest first; the first is what the trainer resumes from."""
    told: set[Verb] = field(default_factory=set[Verb])


class Pack:
    """All that a trainer holds, from the first admission to the last ending."""

    def __init__(self, context: WorkerContext, trainer_id: str, directory: TrainerDirectory, pack_key: str) -> None:
        self.trainer_id = trainer_id
        self.directory = directory
        self.pack_key = pack_key
        self.num_ended = 0
        self.ready: Json | None = None
        """What the trainer said when it had loaded its base."""
        self.heard_at = self.idle_since = time.monotonic()
        self.verdict: tuple[EndReason, str] | None = None
        """Why its trainer was killed by us, if it was."""
        self._context = context
        self._inbox = InboxWriter(directory)
        self._reader = EventReader(directory)
        self._events: deque[Json] = deque()
        self._held: dict[str, Held] = {}
        self._arriving: deque[Held] = deque()

    def __len__(self) -> int:
        return len(self._held)

    # To the trainer

    def admit(self, claim: Claim) -> None:
        """Take a claimed job in; `hear` brings its files and hands it over. It ends where these can't be had."""
        failpoints.pass_by("after_claim")
        held = Held(
            claim=claim,
            curve=Curve(num_steps=claim.job.num_steps or 0),
            checkpoints=list(claim.resume_candidates),
        )
        self._held[claim.claim_id] = held
        self.idle_since = time.monotonic()
        self._arriving.append(held)

    def _hand_over(self, held: Held) -> None:
        claim = held.claim
        try:
            body = admission.bring_files(self._context, self.directory, claim, held.checkpoints)
        except DamagedArtifact as error:
            self._end(held, EndReason.INFRA_LOST, error.sentence())
        except OutOfSpace as error:
            self._end(held, EndReason.INFRA_LOST, error.sentence(), error=publish.wire_error(error))
        else:
            held.curve.trained_tokens = admission.tokens_before(held.checkpoints)
            self._inbox.send("admit", **body)

    def obey(self, orders: dict[str, Orders]) -> None:
        """Pass on what people have asked for since the last heartbeat."""
        for claim_id, order in orders.items():
            held = self._held.get(claim_id)
            if held is None:
                continue
            if order.stale:
                self._drop(held)
            elif order.cancel:
                self._tell(held, "cancel")
            elif order.pause:
                self._tell(held, "pause")

    def _tell(self, held: Held, verb: Verb) -> None:
        if verb not in held.told:
            held.told.add(verb)
            self._inbox.send(verb, claim_id=held.claim.claim_id)

    def drain(self) -> None:
        self._inbox.send("drain")

    def unload(self) -> None:
        self._inbox.send("unload")

    # From the trainer

    def hear(self) -> None:
        """Hand over who has arrived, and record all that the trainer has said.

        Raises Unavailable; then nothing is lost: the next call goes on where this one stopped.
        """
        while self._arriving:
            self._guarded(self._arriving[0], self._hand_over)
            self._arriving.popleft()
        new = self._reader.read()
        if new:
            self.heard_at = time.monotonic()
            self._events.extend(new)
        while self._events:
            self._hear_one(self._events[0])
            self._events.popleft()
        for held in list(self._held.values()):
            if held.curve.is_due(time.monotonic()):
                self._guarded(held, self._flush)

    def _hear_one(self, event: Json) -> None:
        if event["type"] == "ready":
            self.ready = event
            workers.report_trainer(self._context.db, self.trainer_id, report=_without(event, "type", "seconds"))
        elif event["type"] == "memory":
            self._context.pulse.status["report"] = _without(event, "type", "seconds")
        held = self._held.get(event.get("claim_id", ""))
        if held is not None:
            self._guarded(held, lambda held: self._hear_of(held, event))

    def _hear_of(self, held: Held, event: Json) -> None:
        kind = event["type"]
        if kind == "stepped":
            held.curve.stepped(event)
        elif kind == "evaluated":
            held.curve.evaluated(event)
        elif handle := self._handlers().get(kind):
            self._flush(held)
            handle(held, event)

    def _handlers(self) -> dict[str, Callable[[Held, Json], None]]:
        return {
            "admitted": self._admitted,
            "checkpointed": self._checkpointed,
            "checkpoint_failed": self._checkpoint_failed,
            "paused": self._paused,
            "cancelled": self._cancelled,
            "diverged": self._diverged,
            "refused": self._refused,
            "exported": self._exported,
        }

    def _guarded(self, held: Held, action: Callable[[Held], None]) -> None:
        """Whatever goes wrong with one job stays with that job; an unavailable database stops all."""
        try:
            action(held)
        except StaleClaim:
            self._drop(held)
        except Unavailable:
            raise
        except LorryError as error:
            log.exception("%s", held.claim.job.id)
            self._end(held, EndReason.INFRA_LOST, error.sentence(), error=publish.wire_error(error))
            self._inbox.send("cancel", claim_id=held.claim.claim_id)

    def _flush(self, held: Held) -> None:
        points = held.curve.points()
        if not points:
            return
        claim_id = held.claim.claim_id
        claims.record_metrics(self._context.db, claim_id, points)
        claims.record_progress(self._context.db, claim_id, held.curve.progress())
        held.curve.written(len(points), time.monotonic())

    def _admitted(self, held: Held, event: Json) -> None:
        step = event["step"]
        held.curve.step = step
        claims.started(
            self._context.db, held.claim.claim_id, trainer_id=self.trainer_id, resumed_from_step=step or None
        )

    def _checkpointed(self, held: Held, event: Json) -> None:
        folder = self.directory.path / event["folder"]
        publish.checkpoint(self._context, held.claim, folder, step=event["step"], metrics=held.curve.metrics())

    def _checkpoint_failed(self, held: Held, event: Json) -> None:
        claims.record_event(
            self._context.db, held.claim.claim_id, "warn", f"{event['error']['message']} No checkpoint was written."
        )

    def _paused(self, held: Held, event: Json) -> None:
        if event["folder"] is not None:
            self._checkpointed(held, event)
        if "pause" in held.told:
            self._end(held, EndReason.PAUSED_BY_USER, f"Paused at step {event['step']}.")
        else:
            self._end(held, EndReason.DRAINED, f"The worker left; saved at step {event['step']}.")

    def _cancelled(self, held: Held, event: Json) -> None:
        self._end(held, EndReason.CANCELLED_BY_USER, "Cancelled.")

    def _diverged(self, held: Held, event: Json) -> None:
        remedy = "Lower the learning rate, or look at the data around that step; the last checkpoint is kept."
        error = {"code": "diverged", "message": f"{event['message']} {remedy}", "param": "learning_rate"}
        self._end(held, EndReason.DIVERGED, event["message"], error=error)

    def _refused(self, held: Held, event: Json) -> None:
        error = event["error"]
        if event["is_checkpoint"] and held.checkpoints:
            self._fall_back(held, error["message"])
            return
        reason = RETRYABLE_CODES.get(error["code"], EndReason.USER_ERROR)
        if reason is EndReason.CUDA_OOM and self._context.device.kind == "cpu":
            reason = EndReason.HOST_OOM
        wire = {"code": error["code"], "message": f"{error['message']} {error['remedy']}", "param": None}
        self._end(held, reason, error["message"], error=wire)

    def _fall_back(self, held: Held, why: str) -> None:
        bad = held.checkpoints.pop(0)
        admission.fall_back(self._context, held.claim, bad, held.checkpoints, why)
        self._hand_over(held)

    def _exported(self, held: Held, event: Json) -> None:
        report = event["report"]
        if not report["passed"]:
            message = (
                f"PEFT's logits differ from training's by {report['max_abs_diff']:.3g}; {report['tolerance']:.3g} "
                "is allowed."
            )
            error = {"code": "verification_failed", "message": message, "param": None}
            self._end(held, EndReason.VERIFICATION_FAILED, message, error=error)
            return
        assert self.ready is not None
        publish.adapter(
            self._context,
            held.claim,
            self.directory.path / event["folder"],
            event,
            trained_tokens=held.curve.trained_tokens,
            trainer=self.ready,
        )
        self._forget(held)

    # Endings

    def end_all(self, reason: EndReason, detail: str) -> None:
        """End every claim that is left: the trainer has gone."""
        for held in list(self._held.values()):
            self._guarded(held, lambda held: self._end(held, reason, detail))

    def forget_all(self) -> None:
        """Nothing can be recorded any more: recovery ends what is left, if anything is."""
        self._arriving.clear()
        for held in list(self._held.values()):
            self._forget(held)

    def _end(self, held: Held, reason: EndReason, detail: str, *, error: Json | None = None) -> None:
        claims.end(self._context.db, held.claim.claim_id, reason=reason, detail=detail, error=error)
        self._forget(held)

    def _drop(self, held: Held) -> None:
        """Another worker has the job, or recovery has taken it: stop, and write nothing."""
        self._forget(held)
        self._inbox.send("cancel", claim_id=held.claim.claim_id)

    def _forget(self, held: Held) -> None:
        self.num_ended += 1
        claim_id = held.claim.claim_id
        self._held.pop(claim_id, None)
        self._context.pulse.release(claim_id)
        self.idle_since = time.monotonic()
        shutil.rmtree(self.directory.job_path(claim_id), ignore_errors=True)


def _without(event: Json, *names: str) -> Json:
    return {name: value for name, value in event.items() if name not in names}
