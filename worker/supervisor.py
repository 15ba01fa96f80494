"""Start reading here. `supervise` is all that a worker does; the embedded loop and Celery both call it.

Claim jobs of one pack, launch a trainer for them, relay what it says to the record, let more jobs join
while there is room, publish what it finishes. Background chores (imports, preparation) go on beside it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TypeVar

from catalog import logs
from catalog.errors import LorryError, StaleClaim
from catalog.fleet import workers
from catalog.fleet.gangs import NotGathered
from catalog.queue import claiming, claims
from catalog.queue.claiming import Claim
from catalog.registry import base_models as catalog_bases
from catalog.resources import pack_key as packing
from catalog.scheduling.snapshot import Capacity
from catalog.states import EndReason
from catalog.tables.jobs import Job
from catalog.tables.table import new_id
from worker.background import base_models
from worker.background.chores import Chores
from worker.context.context import WorkerContext
from worker.gang import leader, member
from worker.node import scratch_dirs
from worker.process.clock import boot_seconds
from worker.process.launcher import TrainerProcess, launch
from worker.protocol.mailbox import Json, TrainerDirectory, Verb
from worker.session.capacity import announced, room_of, told_room
from worker.session.failures import mishap, mishap_of_job
from worker.session.job_logs import cleaned
from worker.session.session_job import STOPPED, End
from worker.session.sharding import strategy_for
from worker.session.trainer_session import OUTAGES, TrainerSession
from worker.session.watchdog import LEFT_BEHIND, cordon_silent, set_aside, watch_clock

log = logging.getLogger(__name__)
TURN_SECONDS = 0.05
OUTAGE_SECONDS = 0.5
LEFT = End(reason=EndReason.DRAINED, detail="The worker left.")
GANG_LEFT = End(reason=EndReason.DRAINED, detail="The worker, or another of its gang, left.")
UNREACHABLE = End(reason=EndReason.INFRA_LOST, detail="The worker could not reach the database.")
T = TypeVar("T")


def supervise(context: WorkerContext) -> int:
    """Work until there is nothing to import, prepare or train, or the worker is asked to leave.

    Returns how many attempts ended. Raises Unavailable or OutOfSpace where the database does not answer while
    nothing is held. However it ends, no lease is renewed any more.
    """
    try:
        with Chores(context) as chores:
            return _work(context, chores)
    finally:
        context.pulse.release_all()


def _work(context: WorkerContext, chores: Chores) -> int:
    num_ended = 0
    left_over: list[Claim] = []
    while not context.draining:
        had_chores = chores.go_on()
        if not left_over and member.lend(context, chores, _trainer):
            continue
        room = room_of(context)
        context.pulse.status["report"] |= {"room": told_room(room)}
        claimed = left_over or _claim(context, new_id("trainer"), room=room)
        left_over = []
        if claimed:
            num_ended_here, left_over = _train(context, chores, claimed)
            num_ended += num_ended_here
        elif had_chores:
            chores.wait(TURN_SECONDS)
        else:
            return num_ended
    _release(context, left_over, End(reason=EndReason.DRAINED, detail="The worker left before it began."))
    return num_ended


def _train(context: WorkerContext, chores: Chores, claimed: list[Claim]) -> tuple[int, list[Claim]]:
    """One trainer from launch to end: (attempts ended, claims of another pack that were made for the next)."""
    first = claimed[0].job
    waiting = list(claimed)

    def is_unwanted() -> bool:
        return _are_stopped(context, waiting)

    with logs.about({"trainer": first.trainer_id}), ExitStack() as stack:
        try:
            leader.gather(context, stack, first, _trainer_settings(context, first))
            base_dir = base_models.ensure(context, first.base_model, first.base_digest, is_unwanted=is_unwanted)
            settings = _trainer_settings(context, first) | {"base_dir": str(base_dir.absolute())}
            trainer = _trainer(context, stack, str(first.trainer_id), settings | leader.meeting(context))
            leader.start(context, trainer, is_unwanted=is_unwanted)
            pack = _open_pack(context, stack, first, trainer.directory)
            stack.enter_context(announced(context, trainer, pack, first.base_digest))
            for claim in waiting:
                pack.admit(claim)
        except (LorryError, OSError, base_models.Abandoned) as error:
            if isinstance(error, base_models.ImportRefused):
                _try(partial(_note_load, context, first))
            _release(context, waiting, _mishap(context, error))
            return len(claimed), []
        left_over = _attend(context, chores, trainer, pack)
        _conclude(context, trainer, pack)
    return len(claimed) - len(waiting) + pack.num_ended, left_over


def _are_stopped(context: WorkerContext, waiting: list[Claim]) -> bool:
    """Obey what people have asked for while nothing runs yet; True once nobody waits any more."""
    for claim_id, order in context.pulse.take_orders([claim.claim_id for claim in waiting]).items():
        for claim in [claim for claim in waiting if claim.claim_id == claim_id]:
            asked: Verb | None = (
                "cancel" if order.cancel else "pause" if order.pause else "preempt" if order.preempt else None
            )
            if asked is not None:
                _release(context, [claim], STOPPED[asked])
            if asked is not None or order.stale:
                context.spans.ended(claim.claim_id, None)
                waiting.remove(claim)
    return not waiting


def _mishap(context: WorkerContext, error: LorryError | OSError | base_models.Abandoned) -> End:
    """Why there is no trainer."""
    if context.draining:
        return LEFT
    if isinstance(error, NotGathered):
        return End(reason=EndReason.GANG_INCOMPLETE, detail=error.message)
    if isinstance(error, base_models.Abandoned):
        return End(reason=EndReason.DRAINED, detail="Nobody wanted it any more.")
    return mishap(error)


def _note_load(context: WorkerContext, first: Job) -> None:
    """On record as a trainer that never got ready, by which it is known that the base fails here."""
    trainer_id, key = str(first.trainer_id), first.pack_key
    own, digest = context.worker_id, first.base_digest
    workers.register_trainer(context.db, trainer_id=trainer_id, worker_id=own, base_digest=digest, pack_key=key)
    workers.end_trainer(context.db, trainer_id)


def _trainer(context: WorkerContext, stack: ExitStack, trainer_id: str, settings: Json) -> TrainerProcess:
    """The one that stands by, or a new one; it loads its base, and ends with the stack, its directory after it."""
    if context.standby is not None and (trainer := context.standby.take(stack)) is not None:
        trainer.begin(settings)
        if trainer.returncode is None:  # else it ended this very moment, and no job is to pay for that
            return trainer
    path = stack.enter_context(scratch_dirs.owned(context.trainers_dir() / trainer_id))
    directory = TrainerDirectory.create(path)
    trainer = launch(
        directory,
        context.device,
        silence_seconds=context.settings.lease_seconds,
        bases_dir=context.settings.bases_dir(),
        num_processes=context.num_processes,
        in_gang=context.settings.gang is not None,
    )
    stack.callback(trainer.close)
    trainer.begin(settings)
    return trainer


def _trainer_settings(context: WorkerContext, first: Job) -> Json:
    """But for the folder of its base, which is this node's own."""
    return {
        "format": 1,
        "trainer_id": first.trainer_id,
        "dtype": packing.precision_of(first.pack_key),
        "quantization": packing.quantization_of(first.pack_key),
        "strategy": strategy_for(context, first),
        "device": context.device.torch_name(),
        "prefix_disk_bytes": context.settings.prefix_disk_bytes,
        "batch_invariant": context.settings.batch_invariant,
        "idle_seconds": None,  # we tell it when to unload, so that it never leaves while a job is on its way
    }


def _open_pack(context: WorkerContext, stack: ExitStack, first: Job, directory: TrainerDirectory) -> TrainerSession:
    """An empty pack for jobs like `first`; forgotten with the stack."""
    assert first.trainer_id is not None, "the claim names the trainer that it is for"
    description = catalog_bases.get(context.db, first.base_model).description or {}
    strategy = strategy_for(context, first)
    pack = TrainerSession(
        context, first.trainer_id, directory, first.pack_key, description=description, strategy=strategy
    )
    stack.callback(pack.forget_all)
    return pack


def _attend(context: WorkerContext, chores: Chores, trainer: TrainerProcess, pack: TrainerSession) -> list[Claim]:
    """Until the trainer has ended, or can't be ended. Returns claims of another pack, for which this one was unloaded.

    Each part goes on by itself in an outage: what people ask for is obeyed though nothing can be recorded.
    """
    left_over: list[Claim] = []
    looked_at = time.monotonic()
    leaving_at: float | None = None
    farewell: Callable[[], bool] | None = None
    """Still to be said: a disk that is full now may have room before its time is over."""
    while trainer.is_awaited:
        if trainer.is_killed:
            time.sleep(TURN_SECONDS)
            continue
        _patiently(trainer, pack.hear)
        _patiently(trainer, lambda: pack.obey(context.pulse.take_orders(pack.claim_ids)))
        if pack.fault is not None:
            pack.verdict = pack.fault
        if pack.fault is not None or (pack.ready is None and not len(pack)):
            trainer.kill()  # for the latter: everybody has gone before it was ready
            continue
        is_to_leave = _patiently(trainer, lambda: leader.attend(context, trainer)) or context.draining
        if trainer.is_killed:
            continue  # nothing more is claimed for it
        if is_to_leave and leaving_at is None:
            leaving_at, farewell = time.monotonic(), partial(_tell_to_leave, trainer, pack, _left(context))
        has_rung = context.bell.has_rung()
        chores.go_on(has_rung=has_rung)
        if leaving_at is None:
            _patiently(trainer, pack.hand_over)
        is_due = has_rung or time.monotonic() - looked_at >= context.settings.poll_seconds
        if leaving_at is None and is_due:
            looked_at = time.monotonic()
            left_over = _patiently(trainer, lambda: _look_for_more(context, pack)) or []
            if left_over or _is_spent(context, pack):
                leaving_at, farewell = time.monotonic(), partial(pack.tell, "unload")
        if farewell is not None and _patiently(trainer, farewell):
            farewell = None
        watch_clock(context, trainer, pack, leaving_at)
        trainer.wait(TURN_SECONDS)
    return left_over


def _patiently(trainer: TrainerProcess, act: Callable[[], T]) -> T | None:
    """What `act` returns; None in an outage, or where a file can't be had now, after a pause."""
    try:
        return act()
    except (*OUTAGES, OSError) as error:
        log.warning("%s The trainer goes on; its news are kept.", error)
        trainer.wait(OUTAGE_SECONDS)
        return None


def _tell_to_leave(trainer: TrainerProcess, pack: TrainerSession, left: End) -> bool:
    """True once it is told. A trainer that is still loading has nothing to save."""
    if pack.ready is not None:
        pack.is_leaving = True
        return pack.tell("drain")
    pack.verdict = left
    trainer.kill()
    return True


def _look_for_more(context: WorkerContext, pack: TrainerSession) -> list[Claim]:
    """Admit jobs that may join. An empty trainer also lets go of its base for others, whom this returns."""
    if pack.has_suspect:
        return []
    free = room_of(context, pack)
    context.pulse.status["report"] |= {"room": told_room(free), "predicted_bytes": pack.predicted_bytes()}
    if len(pack):
        for claim in _claim(context, pack.trainer_id, room=free, pack_key=pack.pack_key):
            pack.admit(claim)
        return []
    claimed = _claim(context, new_id("trainer"), room=free)
    if claimed and not pack.is_for(claimed[0].job):
        return claimed
    for claim in claimed:
        pack.admit(claim)
    return []


def _is_spent(context: WorkerContext, pack: TrainerSession) -> bool:
    is_old = time.monotonic() - pack.idle_since >= context.settings.idle_seconds
    return not len(pack) and (is_old or leader.is_spent(context))


def _conclude(context: WorkerContext, trainer: TrainerProcess, pack: TrainerSession) -> None:
    """The trainer has ended, or is left behind: hear its last words, and end what it leaves unfinished by the way it
    ended."""
    deadline = boot_seconds() + context.settings.lease_seconds
    lost = UNREACHABLE
    while not context.pulse.lost.is_set() and boot_seconds() < deadline:
        try:
            pack.hear_all()
            set_aside(context, trainer)
            if pack.is_leaving:  # whatever becomes of what it was to save
                pack.end_all(_left(context), only_unseen=True)
            pack.end_all(_verdict(context, trainer, pack))
            return
        except (*OUTAGES, OSError) as error:
            log.warning("%s Waiting to record how the trainer ended.", error)
            own = context.worker_id
            lost = replace(mishap_of_job(error), blamed_worker_id=own) if isinstance(error, OSError) else UNREACHABLE
            time.sleep(OUTAGE_SECONDS)
    _try(lambda: set_aside(context, trainer))
    _try(lambda: pack.end_all(lost))


def _left(context: WorkerContext) -> End:
    return LEFT if context.gang is None else GANG_LEFT


def _verdict(context: WorkerContext, trainer: TrainerProcess, pack: TrainerSession) -> End:
    if trainer.is_left_behind:
        return replace(LEFT_BEHIND, blamed_worker_id=context.worker_id)
    if pack.verdict is not None:
        return pack.verdict
    if context.draining:
        return LEFT
    if not len(pack):
        return End(reason=EndReason.INFRA_LOST, detail="It held no job.")  # nobody is told
    return leader.cause(context, trainer, is_ready=pack.ready is not None)


def _claim(context: WorkerContext, trainer_id: str, *, room: Capacity, pack_key: str | None = None) -> list[Claim]:
    """Claimed jobs, whose leases the heartbeat renews from here on."""
    cordon_silent(context)
    if room.max_jobs <= 0 or (context.gang is not None and not context.gang.may_claim()):
        return []
    since = boot_seconds()
    claimed = claiming.claim_pack(
        context.db,
        worker_id=context.worker_id,
        trainer_id=trainer_id,
        room=room,
        lease_seconds=context.settings.lease_seconds,
        pack_key=pack_key,
        policy=context.policy,
    )
    context.pulse.hold((claim.claim_id for claim in claimed), since=since)
    for claim in claimed:
        context.spans.claimed(claim, worker_id=context.worker_id)
    return claimed


def _release(context: WorkerContext, claimed: Sequence[Claim], end: End) -> None:
    """Give back what no trainer has seen."""
    for claim in claimed:
        context.pulse.release(claim.claim_id)
        _try(partial(_end, context, claim.claim_id, cleaned(end, claim, context.settings.data_dir)))
        context.spans.ended(claim.claim_id, end.reason)


def _end(context: WorkerContext, claim_id: str, end: End) -> None:
    """Of a job that no trainer has begun."""
    policy = context.policy
    claims.end(context.db, claim_id, reason=end.reason, detail=end.detail, is_bystander=True, policy=policy)


def _try(record: Callable[[], object]) -> None:
    """Best effort at the end of things: where it fails, the lease runs out and recovery does the same."""
    try:
        record()
    except (LorryError, StaleClaim, OSError) as error:
        log.warning("Not recorded: %s", error)
