"""The jobs that one trainer holds: what is said to it about them, what it says, and how each ends.

News are taken off a job's queue only once their consequences are recorded, so that an outage loses none; and
each job has a queue of its own, so that one whose files can't be stored now holds nobody else up.
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
from catalog.resources import memory, throughput
from catalog.resources import pack_key as packing
from catalog.resources.sharding import Demand, ShardingStrategy, Strategy, block_bytes
from catalog.resources.throughput import Speeds
from catalog.states import EndReason
from catalog.storage.manifest import DamagedArtifact
from catalog.tables.jobs import Job
from catalog.tables.table import Json
from worker.background.base_models import Abandoned
from worker.background.tokenization import FileRefused
from worker.context.context import WorkerContext
from worker.node import devices
from worker.protocol.mailbox import EventReader, InboxWriter, MalformedEvent, TrainerDirectory, Verb
from worker.protocol.trainer_paths import UnsafePath
from worker.session import staging
from worker.session.event_handlers import EventHandlers, Next
from worker.session.failures import mishap_of_job, untold
from worker.session.job_logs import Output, cleaned
from worker.session.metrics_buffer import Curve
from worker.session.session_job import STOPPED, End, SessionJob
from worker.session.sharding import strategy_for

log = logging.getLogger(__name__)
OUTAGES = (Unavailable, OutOfSpace)
"""What passes by itself, or by somebody's hand: wait, and try the same again."""
NOBODY = ""
"""Is blamed; see Attempt."""


class TrainerSession:
    """All that a trainer holds, from the first admission to the last ending."""

    def __init__(
        self,
        context: WorkerContext,
        trainer_id: str,
        directory: TrainerDirectory,
        pack_key: str,
        *,
        description: Json,
        strategy: Strategy = "replicated",
    ) -> None:
        """description: the base's, from which its memory is reckoned. strategy: how the trainer holds it."""
        self.trainer_id = trainer_id
        self.directory = directory
        self.pack_key = pack_key
        self.strategy: Strategy = strategy
        self.num_ended = 0
        self.ready: Json | None = None
        """What the trainer said when it had loaded its base."""
        self.heard_at = self.idle_since = time.monotonic()
        self.longest_silence = 0.0
        """In seconds by the trainer's own clock, of it while it was busy: the worker may be slow to hear."""
        self._said_at: float | None = None
        """By that clock; None before it has said something of what it has now."""
        self.is_verifying = False
        """Its last word was said amid passes that verify an adapter, of which it speaks at every linear."""
        self.verdict: End | None = None
        """Why its trainer was killed by us, or what it said before it ended itself."""
        self.is_leaving = False
        """It saves what it holds, for somebody is to leave."""
        self.fault: End | None = None
        """Why its trainer is to be killed: it can't be told to stop a job, or it reported a path outside of its
        directory, or what is no event."""
        self.speeds = throughput.UNKNOWN
        """What the trainer has learnt of its ticks."""
        self._context = context
        self._description = description
        self._inbox = InboxWriter(directory)
        self._reader = EventReader(directory)
        self._listener = EventHandlers(context, directory, trainer_id)
        self._output = Output(context, directory)
        self._held: dict[str, SessionJob] = {}
        self._is_ready_recorded = False
        self._memory: Json = {}

    def __len__(self) -> int:
        return len(self._held)

    @property
    def claim_ids(self) -> list[str]:
        return list(self._held)

    @property
    def holding(self) -> ShardingStrategy:
        """Of the base, on the devices."""
        if self.strategy == "replicated":
            return "replicated"
        return "offloaded" if self.strategy.endswith("_offload") else "sharded"

    @property
    def has_suspect(self) -> bool:
        """Then nobody may join."""
        return any(held.is_suspect for held in self._held.values())

    def is_for(self, job: Job) -> bool:
        """Whether the trainer of an empty pack holds the base as the job has it. Asked of jobs that are claimed
        already: nothing is read that could fail, or they would be in no pack."""
        if self.pack_key != job.pack_key:
            return False
        return self.strategy == strategy_for(self._context, job, description=self._description)

    def bytes_to_come(self) -> int:
        """What the trainer is still going to take for what it has been given.

        Until its first job is admitted, its first tick; for each further one, the slice by which the tick grows.
        """
        to_come = [held for held in self._held.values() if not held.is_admitted]
        num_admitted = len(self._held) - len(to_come)
        return self._bytes_of(to_come, beside=num_admitted) + (0 if num_admitted else self._trainer_bytes_to_come())

    def predicted_bytes(self) -> int:
        """What the trainer takes with all that it holds, by the reckoning that let them in."""
        return self._bytes_of(list(self._held.values()), beside=0) + self._whole_trainer_bytes()

    def _bytes_of(self, jobs: list[SessionJob], *, beside: int) -> int:
        """Of these, and of the slices by which they widen the tick. beside: so many more."""
        slice_bytes = memory.slice_bytes(self._description, packing.precision_of(self.pack_key))
        tick_tokens = memory.tick_tokens(self._context.device.kind, num_lanes=devices.num_threads())
        total = 0
        for number, held in enumerate(jobs, start=beside):
            total += held.own_bytes(self._description, recomputes=self._context.device.recomputes)
            total += slice_bytes if memory.widens_tick(number, tick_tokens=tick_tokens) else 0
        return total

    def held_bytes(self) -> int:
        """What would be free without the trainer, of what it has said that it holds. A GPU's allocator gives back
        nothing of its largest tick; a CPU's gives back what it can."""
        held = self._memory
        whole = int(held.get("base_bytes", 0)) + int(held.get("rows_bytes", 0))
        return max(whole, int(held.get("peak_bytes", 0))) if self._context.device.kind == "cuda" else whole

    def _trainer_bytes_to_come(self) -> int:
        """Of its base and its first tick, before any job is admitted. One that is ready and empty waits for none."""
        whole = self._whole_trainer_bytes()
        if self.ready is None:
            return whole + self._context.group.reserve_bytes
        return max(0, whole - int(self.ready["memory"]["base_bytes"])) if self._held else 0

    def _whole_trainer_bytes(self) -> int:
        precision, quantization = packing.precision_of(self.pack_key), packing.quantization_of(self.pack_key)
        whole = memory.trainer_bytes(self._description, precision, quantization)
        if self.holding == "replicated":
            return whole
        divisible, gathered = block_bytes(self._description, precision)
        demand = Demand(whole_bytes=whole, shardable_bytes=divisible, gathered_bytes=gathered)
        return self._context.group.held_bytes(demand, self.holding)

    # To the trainer

    def admit(self, claim: Claim) -> None:
        """Take a claimed job in; `hand_over` brings its files. It ends where these can't be had."""
        failpoints.pass_by("after_claim")
        if not self._held:
            self.heard_at = time.monotonic()  # while it had nothing to do it had nothing to say
            self._said_at = None
        curve = Curve(num_steps=claim.job.num_steps or 0)
        self._held[claim.claim_id] = SessionJob(claim=claim, curve=curve, checkpoints=list(claim.resume_candidates))
        self._output.begin(claim, is_loading=self.ready is None)
        self.idle_since = time.monotonic()

    def hand_over(self) -> None:
        """Bring the files of those who have arrived, and tell the trainer. Raises OutOfSpace, Unavailable."""
        for held in list(self._held.values()):
            if not held.is_handed_over:
                self._guarded(held, self._hand_over)

    def _hand_over(self, held: SessionJob) -> None:
        try:
            body = staging.bring_files(self._context, self.directory, held.claim, held.checkpoints)
            body["trace"] = self._context.spans.of(held.claim.claim_id)
        except Abandoned:
            self._end(held, End(reason=EndReason.DRAINED, detail="The worker left."))
        except (DamagedArtifact, FileRefused) as error:
            self._end(held, mishap_of_job(error))
        except OutOfSpace as error:
            wire = error.as_job_error()
            own = self._context.worker_id
            self._end(
                held, End(reason=EndReason.NODE_FAILED, detail=error.sentence(), error=wire, blamed_worker_id=own)
            )
        else:
            self._inbox.send("admit", **body)
            held.told.clear()
            held.is_handed_over = True

    def obey(self, orders: dict[str, ClaimDirectives]) -> None:
        """Pass on what people have asked for since the last heartbeat. Raises OutOfSpace, Unavailable, OSError; not
        before what is stale is dropped: no heartbeat says that again, as it does what people ask for."""
        for claim_id, order in sorted(orders.items(), key=lambda order: not order[1].stale):
            held = self._held.get(claim_id)
            if held is None:
                continue
            if order.stale:
                self._drop(held)
            elif order.cancel:
                self._guarded(held, partial(self._stop, verb="cancel"))
            elif order.pause:
                self._guarded(held, partial(self._stop, verb="pause"))
            elif order.preempt:
                self._guarded(held, partial(self._stop, verb="preempt"))

    def _stop(self, held: SessionJob, verb: Verb) -> None:
        """By the trainer, unless it has nothing of the job, or what it says can't be put on record now."""
        is_stuck = verb == "cancel" and bool(held.news)
        if self.ready is None or not held.is_handed_over or is_stuck:
            self._end(held, STOPPED[verb])
            self._take_away(held)
        elif verb not in held.told:
            self._inbox.send(verb, claim_id=held.claim.claim_id)
            held.told.add(verb)

    def tell(self, verb: Verb) -> bool:
        """What is about no job. True: it is told. Raises OutOfSpace, OSError."""
        self._inbox.send(verb)
        return True

    # From the trainer

    def hear(self) -> None:
        """Record all that the trainer has said.

        Raises OutOfSpace or Unavailable; then nothing is lost: the next call begins with the other jobs.
        """
        self._take_in()
        if self.ready is not None and not self._is_ready_recorded:
            workers.report_trainer(self._context.db, self.trainer_id, report=_without(self.ready, "type", "seconds"))
            self._is_ready_recorded = True
        for held in list(self._held.values()):
            self._guarded(held, self._catch_up)
        self._output.push_due()

    def hear_all(self) -> None:
        """The same of a trainer that has ended, which may have left more than is read at once."""
        self.hear()
        while self._reader.has_more:
            self.hear()

    def silent_seconds(self) -> float:
        """Since the trainer last said something, be it heard or not."""
        self._take_in()
        return time.monotonic() - self.heard_at

    def _take_in(self) -> None:
        for event in self._read():
            self.heard_at, self.is_verifying = time.monotonic(), bool(event.get("verifying"))
            if self._said_at is not None and self._held and self.ready is not None:
                self.longest_silence = max(self.longest_silence, event["seconds"] - self._said_at)
            self._said_at = event["seconds"] if event["type"] != "idle" else None
            held = self._held.get(event.get("claim_id", ""))
            if held is not None:
                held.news.append(event)
                held.drop_outdated()
            elif event["type"] == "ready":
                self.ready, self._memory = _without(event, "spans"), event["memory"]
                for claim_id in self._held:
                    self._context.spans.told(claim_id, event)
            elif event["type"] == "memory":
                self._memory = event
                self.speeds = Speeds.of_report(event.get("tick_speeds"))
                self._context.pulse.status["report"] |= _without(event, "type", "seconds", "verifying")
            elif event["type"] == "load_refused":
                self.verdict = self._listener.load_refusal(event["error"], event["ranks"])

    def _read(self) -> list[Json]:
        try:
            return self._reader.read()
        except MalformedEvent as error:
            log.error("%s %s", self.trainer_id, error.message)
            self.fault = End(reason=EndReason.TRAINER_CRASHED, detail=error.message)
            self._reader.has_more = False
            return []

    def _catch_up(self, held: SessionJob) -> None:
        while held.superseded:
            self.directory.delete(held.claim.claim_id, held.superseded[0])
            del held.superseded[0]
        while held.news:
            self._hear_of(held, held.news[0])
            if held.news:  # its end has cleared them
                held.news.popleft()
        if self._holds(held) and held.curve.is_due(time.monotonic()):
            self._flush(held)
        if self._holds(held) and held.is_to_stop:
            self._stop(held, "cancel")

    def _hear_of(self, held: SessionJob, event: Json) -> None:
        if event["type"] == "stepped":
            held.curve.stepped(event)
        elif event["type"] == "evaluated":
            held.curve.evaluated(event)
        else:
            self._flush(held)
            follows = self._listener.follow(held, event, ready=self.ready)
            if isinstance(follows, End):
                self._end(held, follows)
            elif follows is Next.HAND_OVER:
                held.is_handed_over = False
            elif follows is Next.COMPLETED:
                self._context.spans.ended(held.claim.claim_id, EndReason.COMPLETED)
                self._forget(held)

    def _flush(self, held: SessionJob) -> None:
        points = held.curve.points()
        if not points:
            return
        claim_id = held.claim.claim_id
        held.is_to_stop = recording.record_metrics(self._context.db, claim_id, points) or held.is_to_stop
        recording.record_progress(self._context.db, claim_id, held.curve.progress())
        held.curve.written(len(points), time.monotonic())

    def _guarded(self, held: SessionJob, action: Callable[[SessionJob], None]) -> None:
        """Whatever goes wrong with one job stays with that job; an outage goes up, the others' turn being next."""
        with logs.about(self._subjects(held)):
            self._act(held, action)

    def _subjects(self, held: SessionJob) -> Subjects:
        """What lines of the log are about while something is done for this job."""
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
        except UnsafePath as error:
            log.error("%s %s", held.claim.job.id, error.message)
            end = mishap_of_job(error)
            self._end(held, end)
            self.fault = end
        except (LorryError, OSError) as error:
            log.exception("%s", held.claim.job.id)
            self._end(held, mishap_of_job(error))
            self._take_away(held)

    # Endings

    def end_all(self, end: End, *, only_unseen: bool = False) -> None:
        """End every claim that is left: the trainer has gone. only_unseen: of those that it was not given."""
        for held in list(self._held.values()):
            if not (only_unseen and held.is_handed_over):
                self._guarded(held, partial(self._end, end=end))

    def forget_all(self) -> None:
        """Nothing can be recorded any more: recovery ends what is left, if anything is."""
        for held in list(self._held.values()):
            self._forget(held)

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
            self._forget(held)

    def _blamed(self, end: End) -> str | None:
        """What the trainer of a gang says of a job, or does not say, may be any node's doing."""
        is_of_gang = self._context.gang is not None and self._context.gang.round is not None
        return NOBODY if end.blamed_worker_id is None and is_of_gang else end.blamed_worker_id

    def _drop(self, held: SessionJob) -> None:
        """Another worker has the job, or recovery has taken it: stop, and write nothing."""
        self._output.drop(held.claim.claim_id)
        self._forget(held)
        self._take_away(held)

    def _take_away(self, held: SessionJob) -> None:
        """From the trainer."""
        try:
            self._inbox.send("cancel", claim_id=held.claim.claim_id)
        except (OutOfSpace, OSError) as error:
            if held.is_handed_over:
                self.fault = untold(error, worker_id=self._context.worker_id)

    def _holds(self, held: SessionJob) -> bool:
        return self._held.get(held.claim.claim_id) is held

    def _forget(self, held: SessionJob) -> None:
        claim_id = held.claim.claim_id
        if self._held.pop(claim_id, None) is None:
            return
        self.num_ended += 1
        self._context.spans.ended(claim_id, None)
        held.news.clear()
        self._context.pulse.release(claim_id)
        self._output.end(claim_id)
        self.idle_since = time.monotonic()
        self.directory.delete_job(claim_id)


def _without(event: Json, *names: str) -> Json:
    return {name: value for name, value in event.items() if name not in names}
