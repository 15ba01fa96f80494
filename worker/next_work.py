"""Finds the work of a worker's trainers: jobs for which it has capacity, or a base model that requests wait for."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

from catalog.clock import boot_seconds
from catalog.errors import LorryError
from catalog.fleet import workers
from catalog.inference import engines
from catalog.queue import claiming
from catalog.queue.claiming import Claim
from catalog.resources import memory, throughput
from catalog.scheduling.snapshot import Capacity
from catalog.tables.jobs import Job
from catalog.tables.table import new_id
from worker.context.context import WorkerContext
from worker.gang.gang import WorkerGang
from worker.node import devices
from worker.process.launcher import TrainerProcess
from worker.protocol.mailbox import Json
from worker.session.base_load import BaseLoad, BaseToLoad, base_demand
from worker.session.trainer_session import TrainerSession
from worker.session.watchdog import cordon_silent

FREE_WORKER_POLLS = 2.0
"""Polls for which a request for another base model is left to workers without a trainer."""
SWITCH_SECONDS = 30.0
"""How long at least a trainer without jobs answers requests while those for another base model wait."""
GONE_SECONDS = 5.0
"""A client that has sent no request for this long after an answer counts as gone."""
BATCH_SECONDS = 600.0
"""How long at least a trainer without jobs answers batches while those of another base model wait."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The work of one trainer: claimed jobs, or a base model that inference requests wait for."""

    first: Job | BaseToLoad
    jobs: list[Claim]
    load: BaseLoad | None = None
    """The task to load that base model. None for jobs."""

    def give_back(self) -> None:
        """Release the task to load a base model, if there is one."""
        if self.load is not None:
            self.load.give_back()


def find_work(context: WorkerContext, gang: WorkerGang) -> Work | None:
    """Claim jobs that a new trainer can train together, or else the load of a base model that requests wait for."""
    capacity = free_capacity(context)
    context.heartbeat.status["report"] |= {"capacity": capacity_report(capacity)}
    if claimed := _claim(context, gang, new_id("trainer"), capacity=capacity):
        return Work(first=claimed[0].job, jobs=claimed)
    reserved = (_reserved(context, base) for base in bases_to_load(context, capacity))
    return next((work for work in reserved if work is not None), None)


def _reserved(context: WorkerContext, base: BaseToLoad) -> Work | None:
    """Claim the load of a base model. Returns None if another worker was faster."""
    lease_seconds = context.settings.lease_seconds
    claimed = engines.reserve(context.db, base.pack_key, worker_id=context.worker_id, lease_seconds=lease_seconds)
    return None if claimed is None else Work(first=base, jobs=[], load=BaseLoad(context, claimed))


def next_work(context: WorkerContext, gang: WorkerGang, session: TrainerSession) -> Work | None:
    """Claim more for the trainer. Returns claimed work that it has to be unloaded for. Jobs come first."""
    return _claim_more(context, gang, session) or _yield_to(context, session)


def _claim_more(context: WorkerContext, gang: WorkerGang, session: TrainerSession) -> Work | None:
    """Claim more jobs, and admit those that this trainer can train. An empty trainer may also claim jobs for another
    base: those are returned, and the trainer has to be unloaded for them."""
    if session.has_suspect:
        return None
    capacity = free_capacity(context, session)
    report = {"capacity": capacity_report(capacity), "predicted_bytes": session.memory.predicted()}
    context.heartbeat.status["report"] |= report
    if len(session):
        claimed = _claim(context, gang, session.trainer_id, capacity=capacity, pack_key=session.pack_key)
    else:
        claimed = _claim(context, gang, new_id("trainer"), capacity=capacity)
        if claimed and not session.is_for(claimed[0].job):
            return Work(first=claimed[0].job, jobs=claimed)
    for claim in claimed:
        session.admit(claim)
    return None


def _claim(
    context: WorkerContext, gang: WorkerGang, trainer_id: str, *, capacity: Capacity, pack_key: str | None = None
) -> list[Claim]:
    """Claim jobs that fit. From here on, the heartbeat renews their leases. pack_key: only jobs of that pack."""
    cordon_silent(context)
    if capacity.max_jobs <= 0 or not gang.may_claim():
        return []
    since = boot_seconds()  # taken before the claim, so that the lease never seems longer than it is
    claimed = claiming.claim_pack(
        context.db,
        worker_id=context.worker_id,
        trainer_id=trainer_id,
        capacity=capacity,
        lease_seconds=context.settings.lease_seconds,
        pack_key=pack_key,
        policy=context.policy,
    )
    context.heartbeat.hold((claim.claim_id for claim in claimed), since=since)
    for claim in claimed:
        context.spans.claimed(claim, worker_id=context.worker_id)
    return claimed


def _yield_to(context: WorkerContext, session: TrainerSession) -> Work | None:
    """Reserve another base model that requests wait for, if a trainer without jobs is to be unloaded for it now.

    Free workers load that base model first. A trainer that has requests stays for SWITCH_SECONDS. Then it gets no
    more, and is unloaded when it has answered those of clients. Batches of another base model wait until the trainer
    has had no request for SWITCH_SECONDS, or, if its clients are gone, until BATCH_SECONDS after it was loaded.
    """
    inference = session.inference
    wanted = _wanted_base(context, session)
    inference.regulate(is_yielding=wanted is not None and inference.has_clients)
    return None if wanted is None or inference.is_yielding else _reserved(context, wanted)


def _wanted_base(context: WorkerContext, session: TrainerSession) -> BaseToLoad | None:
    """Return the base model that a trainer without jobs yields to, if any."""
    inference = session.inference
    if len(session) or inference.ready_at is None:
        return None
    now = time.monotonic()
    loaded_seconds = now - inference.ready_at
    has_clients = now - inference.last_client_at < GONE_SECONDS
    if (has_clients or not inference.is_idle) and loaded_seconds < SWITCH_SECONDS:
        return None
    is_quiet = inference.is_idle and now - inference.last_answer_at >= SWITCH_SECONDS
    wanted = bases_to_load(
        context,
        free_capacity(context, session),
        waited_seconds=SWITCH_SECONDS if has_clients else FREE_WORKER_POLLS * context.settings.poll_seconds,
        with_batches=is_quiet or (not has_clients and loaded_seconds >= BATCH_SECONDS),
    )
    return next(wanted, None)


def free_capacity(context: WorkerContext, session: TrainerSession | None = None) -> Capacity:
    """Return the capacity for jobs that join the session, or, without a session, for a new trainer.

    The base of an empty trainer counts as free: the next job uses it, or it is unloaded. On a CPU, so does the memory
    of the standby trainer, because it becomes the new trainer.
    """
    free_bytes, group = context.free_bytes(), context.group
    tick_tokens = memory.tick_tokens(context.device.kind, num_lanes=devices.num_threads())
    max_jobs = _places(context, session)
    if session is None:
        if context.standby is not None and context.device.kind == "cpu":
            free_bytes += context.standby.memory_bytes()
        return Capacity(
            max_jobs=max_jobs,
            memory_bytes_free=free_bytes,
            tick_tokens=tick_tokens,
            recomputes=context.device.recomputes,
            group=group,
        )
    when_empty = free_bytes + session.memory.in_use()
    if session.ready is not None:
        when_empty += group.reserve_bytes
    if not len(session) and session.ready is not None:
        free_bytes += int(session.ready["memory"]["base_bytes"]) + group.reserve_bytes
    free_bytes += session.memory.spare()
    return Capacity(
        max_jobs=max_jobs,
        memory_bytes_free=max(0, free_bytes - session.memory.to_come()),
        memory_bytes_when_empty=when_empty,
        resident_key=session.pack_key,
        num_jobs=len(session),
        tick_tokens=tick_tokens,
        slice_bytes=session.memory.slice_bytes(),
        recomputes=context.device.recomputes,
        group=group,
        holding=session.holding,
    )


def bases_to_load(
    context: WorkerContext, capacity: Capacity, *, waited_seconds: float = 0.0, with_batches: bool = True
) -> Generator[BaseToLoad]:
    """Yield the base models of requests that no trainer can answer, if they fit on this worker without its trainer.

    waited_seconds, with_batches: as for `engines.wanted`. Raises Unavailable.
    """
    if context.settings.gang is not None:
        return  # its trainers serve jobs, for which the whole gang meets
    when_empty = capacity.memory_bytes_when_empty
    available = capacity.memory_bytes_free if when_empty is None else when_empty
    for wanted in engines.wanted(
        context.db, worker_id=context.worker_id, waited_seconds=waited_seconds, with_batches=with_batches
    ):
        base = BaseToLoad(
            trainer_id=new_id("trainer"),
            base_model=wanted.base_model,
            base_digest=wanted.base_digest,
            pack_key=wanted.pack_key,
        )
        if context.group.needed_bytes(base_demand(context, base)) <= available:
            yield base


def capacity_report(capacity: Capacity) -> Json:
    """Return the part of the capacity that the next heartbeat reports, for placement decisions and for users."""
    names = ("max_jobs", "memory_bytes_free", "holding")
    return {name: getattr(capacity, name) for name in names}


def _places(context: WorkerContext, session: TrainerSession | None) -> int:
    """Return how many jobs may join before a job of the trainer would slow down by more than the operator allows.

    The next heartbeat reports the basis of this decision, so that users can see why a job waits.
    """
    settings = context.settings
    num_jobs, speeds = (len(session), session.speeds) if session is not None else (0, throughput.UNKNOWN)
    places = throughput.free_places(
        num_jobs,
        speeds,
        max_slowdown=settings.max_slowdown,
        at_most=max(0, settings.max_jobs_per_trainer - num_jobs),
    )
    if session is not None:
        context.heartbeat.status["report"] |= {"saturation": throughput.described(num_jobs, speeds, settings, places)}
    return places


@contextmanager
def announced(
    context: WorkerContext, trainer: TrainerProcess, session: TrainerSession, base_digest: str
) -> Generator[None]:
    """Record the trainer, and let the worker's heartbeat keep it alive, for as long as the block lasts."""
    trainer_id, pack_key = session.trainer_id, session.pack_key
    named = {"trainer_id": trainer_id, "worker_id": context.worker_id, "base_digest": base_digest}
    workers.register_trainer(context.db, **named, pack_key=pack_key, report=_group(context))
    context.heartbeat.status |= {"resident_base": base_digest, "trainer_id": trainer_id, "report": {}}
    context.heartbeat.guard(on_beat=trainer.send_heartbeat, on_lost=trainer.kill)
    try:
        yield
    finally:
        context.heartbeat.guard(on_beat=None, on_lost=None)
        context.heartbeat.status |= {"resident_base": None, "trainer_id": None}
        exit_report = {"exit_status": trainer.returncode, **_speeds(context)}
        try:
            workers.end_trainer(context.db, trainer_id, report=exit_report)
        except LorryError as error:  # the heartbeat no longer names this trainer
            log.warning("Not recorded: %s", error)


def _group(context: WorkerContext) -> Json:
    """Return the trainer's devices, and the workers of the gang that participate in it."""
    device = context.device.as_json()
    group = {"group": {name: device[name] for name in ("indices", "cores")}}
    if context.led_round is None:
        return group
    return group | {"gang": {"name": context.settings.gang, "workers": context.led_round.workers}}


def _speeds(context: WorkerContext) -> Json:
    """Return the trainer's measured throughput, for plans of jobs on its base model."""
    speeds = context.heartbeat.status["report"].get("tick_speeds")
    return {"tick_speeds": speeds} if speeds else {}
