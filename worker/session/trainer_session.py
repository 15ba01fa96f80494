"""A session of one trainer: its jobs, the messages to it, the events from it, and the end of each job's attempt.

An event leaves its job's queue only once its consequences are recorded, so an outage loses no event. Each job has its
own queue, so a job whose files can't be stored now does not delay the others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from catalog import failpoints, logs, tracing
from catalog.errors import LorryError, OutOfSpace, StaleClaim, Unavailable
from catalog.fleet import workers
from catalog.lifecycle import recording
from catalog.logs import Subjects
from catalog.queue import claims
from catalog.queue.claiming import Claim
from catalog.queue.claims import ClaimDirectives
from catalog.resources import throughput
from catalog.resources.sharding import ShardingStrategy, Strategy
from catalog.resources.throughput import Speeds
from catalog.states import EndReason
from catalog.storage.manifest import DamagedArtifact
from catalog.tables.jobs import Job
from catalog.tables.table import Json
from worker.background.child_task import Abandoned
from worker.background.tokenization import FileRefused
from worker.context.context import WorkerContext
from worker.inference.session import InferenceSession
from worker.protocol.mailbox import EventReader, InboxWriter, MalformedEvent, TrainerDirectory, Verb, applying
from worker.protocol.trainer_paths import UnsafePath
from worker.session import staging
from worker.session.base_load import BaseLoad, strategy_for
from worker.session.event_handlers import EventHandlers, Next
from worker.session.failures import TrainerEnd, inbox_failure, job_failure
from worker.session.job_logs import Output, cleaned
from worker.session.memory_ledger import MemoryLedger
from worker.session.session_job import STOPPED, Curve, End, SessionJob, requested_verb

log = logging.getLogger(__name__)
OUTAGES = (Unavailable, OutOfSpace)
"""Temporary failures of the database, the store or the disk: wait, then retry."""
UNLOAD_SECONDS = 10.0
"""How long a trainer may still answer inference requests after it was to unload."""
IN_RECORD = (
    *("pid", "device", "processor", "dtype", "quantization", "invariance", "num_threads", "num_processes", "strategy"),
    *("load_seconds", "probe_seconds", "elementwise_kernels", "versions", "memory"),
)
"""The fields of a `ready` event that the trainer's record gets."""
IN_HEARTBEAT = ("base_bytes", "adapter_bytes", "peak_bytes", "cached_bytes", "tokens_per_second", "tick_speeds")
"""The fields of a `memory` event that the worker's heartbeat reports."""
NO_WORKER = ""
"""No worker is at fault; see Attempt."""


class TrainerSession:
    """All claims of one trainer, from the first admission to the end of the last attempt."""

    def __init__(
        self,
        context: WorkerContext,
        trainer_id: str,
        directory: TrainerDirectory,
        pack_key: str,
        *,
        description: Json,
        strategy: Strategy = "replicated",
        load: BaseLoad | None = None,
    ) -> None:
        """description: of the base model, from which memory is estimated. strategy: how the devices hold the base.
        load: the task to load it for inference requests. None: it is loaded for jobs."""
        self.trainer_id = trainer_id
        self.directory = directory
        self.pack_key = pack_key
        self.strategy: Strategy = strategy
        self.ready: Json | None = None
        """The trainer's `ready` event, which it sends once it has loaded its base. None before."""
        self.last_event_at = self.idle_since = time.monotonic()
        self.longest_silence = 0.0
        """The longest pause in seconds between two events of the busy trainer. By the trainer's own clock, because the
        worker may be slow to read."""
        self._last_event_seconds: float | None = None
        """The time of the last event by that clock. None if none arrived since the trainer was last empty."""
        self.is_verifying = False
        """The last event came from the verification of an adapter, which sends an event for every linear layer."""
        self.outcome: End | None = None
        """Why the supervisor killed the trainer, or the error that the trainer reported before it exited."""
        self.is_shutting_down = False
        """The trainer was sent `drain`: it saves all jobs, because the worker or another of its gang shuts down."""
        self.fault: End | None = None
        """Why the supervisor must kill the trainer: it can't be sent a message to stop a job, it reported a path
        outside its directory, or it sent something that is no event."""
        self.speeds = throughput.UNKNOWN
        """The trainer's measured throughput."""
        self._context = context
        self.inference = InferenceSession(context.inference_server, context.store, directory)
        self._load = load
        self._inbox = InboxWriter(directory)
        self._reader = EventReader(directory)
        self._handlers = EventHandlers(context, directory, trainer_id)
        self._output = Output(context, directory)
        self._held: dict[str, SessionJob] = {}
        self.memory = MemoryLedger(context, description, pack_key, holding=self.holding, jobs=self._held)
        self._is_ready_recorded = False
        self._had_requests = False
        self._unloading_since: float | None = None

    def __len__(self) -> int:
        return len(self._held)

    @property
    def is_empty(self) -> bool:
        """Whether it holds neither a job nor an inference request."""
        return not self._held and self.inference.is_idle

    @property
    def claim_ids(self) -> list[str]:
        return list(self._held)

    @property
    def holding(self) -> ShardingStrategy:
        """How the devices hold the base model."""
        if self.strategy == "replicated":
            return "replicated"
        return "offloaded" if self.strategy.endswith("_offload") else "sharded"

    @property
    def has_suspect(self) -> bool:
        """Whether it holds a suspect job, which no other job may join."""
        return any(held.is_suspect for held in self._held.values())

    def is_for(self, job: Job) -> bool:
        """Return whether this trainer, if empty, can train the job: it holds the job's base model, with the job's
        strategy.

        The job is already claimed. Therefore this method reads nothing that could fail: the claim would then belong to
        no trainer.
        """
        if self.pack_key != job.pack_key:
            return False
        return self.strategy == strategy_for(self._context, job)

    # To the trainer

    def admit(self, claim: Claim) -> None:
        """Add a claimed job. `hand_over` copies its files, or ends the attempt if they are not available."""
        failpoints.pass_by("after_claim")
        if not self._held:
            self.last_event_at = time.monotonic()  # an empty trainer sends no events
            self._last_event_seconds = None
        curve = Curve(num_steps=claim.job.num_steps or 0)
        self._held[claim.claim_id] = SessionJob(claim=claim, curve=curve, checkpoints=list(claim.resume_candidates))
        self._output.begin(claim, is_loading=self.ready is None)
        self.idle_since = time.monotonic()

    def hand_over(self) -> None:
        """Copy the files of new jobs, and send their `admit` messages to the trainer. Raises OutOfSpace,
        Unavailable."""
        for held in list(self._held.values()):
            if not held.is_handed_over:
                self._guarded(held, self._hand_over)

    def _hand_over(self, held: SessionJob) -> None:
        try:
            body = staging.stage_files(self._context, self.directory, held.claim, held.checkpoints)
        except Abandoned:
            self._end(held, TrainerEnd.WORKER_SHUTDOWN.value)
        except (DamagedArtifact, FileRefused) as error:
            self._end(held, job_failure(error))
        except OutOfSpace as error:
            job_error = error.as_job_error()
            own = self._context.worker_id
            self._end(
                held, End(reason=EndReason.NODE_FAILED, detail=error.sentence(), error=job_error, blamed_worker_id=own)
            )
        else:
            self._inbox.send("admit", **body)
            held.sent.clear()
            held.is_handed_over = True

    def apply_directives(self, directives: dict[str, ClaimDirectives]) -> None:
        """Drop stale claims, and stop the jobs that users or the scheduler want stopped.

        Raises OutOfSpace, Unavailable, OSError, but only after all stale claims were dropped: a heartbeat reports a
        claim as stale only once, and repeats every other directive.
        """
        for claim_id, directive in sorted(directives.items(), key=lambda item: not item[1].stale):
            held = self._held.get(claim_id)
            if held is None:
                continue
            if directive.stale:
                self._drop(held)
            elif (verb := requested_verb(directive)) is not None:
                self._guarded(held, partial(self._stop, verb=verb))

    def _stop(self, held: SessionJob, verb: Verb) -> None:
        """Have the trainer stop the job. End the attempt here if the trainer does not have the job yet, or if a
        cancelled job's events can't be recorded now."""
        is_stuck = verb == "cancel" and bool(held.pending_events)
        if self.ready is None or not held.is_handed_over or is_stuck:
            self._end(held, STOPPED[verb])
            self._discard(held)
        elif verb not in held.sent:
            self._inbox.send(verb, claim_id=held.claim.claim_id)
            held.sent.add(verb)

    def send(self, verb: Verb) -> bool:
        """Send a message that concerns no single job. Returns True: it was sent. Raises OutOfSpace, OSError."""
        self._inbox.send(verb)
        return True

    def serve_requests(self) -> None:
        """Note what inference reports: a fault, and that the trainer is active."""
        inference = self.inference
        inference.regulate(has_suspect=self.has_suspect)
        if inference.fault is not None and self.fault is None:
            self._distrust(inference.fault)
        if inference.is_idle:
            self._had_requests = False
        elif not self._had_requests:
            self._had_requests = True
            self.last_event_at = time.monotonic()  # an empty trainer sends no events
        self.last_event_at = max(self.last_event_at, inference.last_event_at)

    def unload(self) -> bool:
        """Unload the trainer once it has answered its requests, or after UNLOAD_SECONDS. It gets no new requests.

        Returns whether the message was sent. Raises OutOfSpace, OSError.
        """
        if self._unloading_since is None:
            self.inference.stop_accepting()
            self._unloading_since = time.monotonic()
        if not self.inference.is_idle and time.monotonic() - self._unloading_since < UNLOAD_SECONDS:
            return False
        return self.send("unload")

    # From the trainer

    def read_events(self) -> None:
        """Read the trainer's new events, and record their consequences.

        Raises OutOfSpace or Unavailable. Then no event is lost, and the next call begins with the other jobs.
        """
        self._receive()
        if self.ready is not None and not self._is_ready_recorded:
            self._record_ready(self.ready)
        for held in list(self._held.values()):
            self._guarded(held, self._catch_up)
        self._output.push_due()

    def read_all_events(self) -> None:
        """Read all events of a trainer that has exited, which may be more than one read returns."""
        self.read_events()
        while self._reader.has_more:
            self.read_events()

    def silent_seconds(self) -> float:
        """Return the seconds since the trainer's last event, recorded or not."""
        self._receive()
        return time.monotonic() - self.last_event_at

    def _record_ready(self, ready: Json) -> None:
        report = {name: ready[name] for name in IN_RECORD if name in ready}
        try:
            with applying("ready"):
                where = {"address": self._context.inference_server.address, "secret": self.inference.secret}
                workers.report_trainer(self._context.db, self.trainer_id, report=report, **where)
        except OUTAGES:
            raise
        except LorryError as error:
            if not isinstance(error, MalformedEvent):
                error = MalformedEvent("is a 'ready' event that can't be stored")
            self._distrust(error)
        self._is_ready_recorded = True
        self.inference.open()
        if self._load is not None:
            self._load.succeed()

    def _receive(self) -> None:
        """Read events, up to the first one that is malformed."""
        try:
            for event in self._reader.read():
                with applying(event["type"]):
                    self._take(event)
        except MalformedEvent as error:
            self._distrust(error)
            self._reader.has_more = False

    def _take(self, event: Json) -> None:
        self.last_event_at, self.is_verifying = time.monotonic(), bool(event.get("verifying"))
        if self._last_event_seconds is not None and self._held and self.ready is not None:
            self.longest_silence = max(self.longest_silence, event["seconds"] - self._last_event_seconds)
        self._last_event_seconds = event["seconds"] if event["type"] != "idle" else None
        held = self._held.get(event.get("claim_id", ""))
        if held is not None:
            held.pending_events.append(event)
            held.drop_outdated()
        elif event["type"] == "ready":
            if "base_bytes" not in event["memory"]:
                raise MalformedEvent("is a 'ready' event without the memory of the base model")
            self.ready = _without(event, "spans")
            self.memory.ready(event)
            self.idle_since = time.monotonic()
            for claim_id in self._held:
                self._context.spans.reported(claim_id, event)
        elif event["type"] == "memory":
            self.memory.report = event
            self.speeds = Speeds.of_report(event.get("tick_speeds"))
            self._context.heartbeat.status["report"] |= {name: event[name] for name in IN_HEARTBEAT if name in event}
        elif event["type"] == "load_refused":
            self.outcome = self._handlers.load_refusal(event["error"], event["ranks"])

    def _distrust(self, error: MalformedEvent | UnsafePath) -> End:
        """Have the supervisor kill the trainer. Returns how the attempts of its jobs end."""
        named = error.by(f"Trainer {self.trainer_id} on worker {self._context.worker_id}")
        log.error("%s", named.message, exc_info=error.__cause__)
        self.fault = job_failure(named)
        return self.fault

    def _catch_up(self, held: SessionJob) -> None:
        while held.superseded:
            self.directory.delete(held.claim.claim_id, held.superseded[0])
            del held.superseded[0]
        while held.pending_events:
            with applying(held.pending_events[0]["type"]):
                self._handle(held, held.pending_events[0])
            if held.pending_events:  # the end of an attempt clears them
                held.pending_events.popleft()
        if self._holds(held) and held.curve.is_due(time.monotonic()):
            with applying("stepped"):
                self._flush(held)
        if self._holds(held) and held.is_to_stop:
            self._stop(held, "cancel")

    def _handle(self, held: SessionJob, event: Json) -> None:
        if event["type"] == "stepped":
            held.curve.stepped(event)
        elif event["type"] == "evaluated":
            held.curve.evaluated(event)
        else:
            self._flush(held)
            follows = self._handlers.follow(held, event, ready=self.ready)
            if isinstance(follows, End):
                self._end(held, follows)
            elif follows is Next.HAND_OVER:
                held.is_handed_over = False
            elif follows is Next.COMPLETED:
                self._context.spans.ended(held.claim.claim_id, EndReason.COMPLETED)
                self._release(held)

    def _flush(self, held: SessionJob) -> None:
        points = held.curve.points()
        if not points:
            return
        claim_id = held.claim.claim_id
        held.is_to_stop = recording.record_metrics(self._context.db, claim_id, points) or held.is_to_stop
        recording.record_progress(self._context.db, claim_id, held.curve.progress())
        held.curve.written(len(points), time.monotonic())

    def _guarded(self, held: SessionJob, action: Callable[[SessionJob], None]) -> None:
        """Do something for one job, so that its failure ends only its own attempt. An outage is raised, after moving
        the job behind the others."""
        with logs.about(self._subjects(held)):
            self._act(held, action)

    def _subjects(self, held: SessionJob) -> Subjects:
        """Return the fields of log lines that are written during an action for this job."""
        claim, trace = held.claim, tracing.trace_id(self._context.spans.of(held.claim.claim_id))
        return {"job": claim.job.id, "claim": claim.claim_id, "trainer": self.trainer_id, "trace": trace}

    def _act(self, held: SessionJob, action: Callable[[SessionJob], None]) -> None:
        try:
            action(held)
        except StaleClaim:
            self._drop(held)
        except OUTAGES:
            if self._holds(held):
                self._held[held.claim.claim_id] = self._held.pop(held.claim.claim_id)
            raise
        except (UnsafePath, MalformedEvent) as error:
            self._end(held, self._distrust(error))
        except (LorryError, OSError) as error:
            log.exception("%s", held.claim.job.id)
            self._end(held, job_failure(error))
            self._discard(held)

    # Endings

    def end_all(self, end: End, *, only_unseen: bool = False) -> None:
        """End every remaining attempt: the trainer has exited. only_unseen: only of jobs that it was not given."""
        for held in list(self._held.values()):
            if not (only_unseen and held.is_handed_over):
                self._guarded(held, partial(self._end, end=end))

    def release_all(self) -> None:
        """Release every remaining claim without recording anything, and interrupt the answers. Recovery ends those
        attempts."""
        self.inference.close()
        for held in list(self._held.values()):
            self._release(held)

    def _end(self, held: SessionJob, end: End) -> None:
        end = cleaned(end, held.claim, self._context.settings.data_dir)
        try:
            claims.end(
                self._context.db,
                held.claim.claim_id,
                reason=end.reason,
                detail=end.detail,
                error=end.error,
                is_bystander=self.ready is None or not held.is_handed_over,  # the trainer had not begun it
                blamed_worker_id=self._blamed(end),
                policy=self._context.policy,
            )
        except StaleClaim:
            self._drop(held)
        else:
            self._context.spans.ended(held.claim.claim_id, end.reason)
            self._release(held)

    def _blamed(self, end: End) -> str | None:
        """Return the worker at fault. In a round of several nodes, any node may have caused the failure of the trainer,
        so no worker is."""
        if end.blamed_worker_id is None and self._context.led_round is not None:
            return NO_WORKER
        return end.blamed_worker_id

    def _drop(self, held: SessionJob) -> None:
        """Another worker or recovery has the job: stop training it, and record nothing."""
        self._output.drop(held.claim.claim_id)
        self._release(held)
        self._discard(held)

    def _discard(self, held: SessionJob) -> None:
        """Have the trainer discard the job."""
        try:
            self._inbox.send("cancel", claim_id=held.claim.claim_id)
        except (OutOfSpace, OSError) as error:
            if held.is_handed_over:
                self.fault = inbox_failure(error, worker_id=self._context.worker_id)

    def _holds(self, held: SessionJob) -> bool:
        return self._held.get(held.claim.claim_id) is held

    def _release(self, held: SessionJob) -> None:
        claim_id = held.claim.claim_id
        if self._held.pop(claim_id, None) is None:
            return
        self._context.spans.ended(claim_id, None)
        held.pending_events.clear()
        self._context.heartbeat.release(claim_id)
        self._output.end(claim_id)
        self.idle_since = time.monotonic()
        self.directory.delete_job(claim_id)


def _without(event: Json, *names: str) -> Json:
    return {name: value for name, value in event.items() if name not in names}
