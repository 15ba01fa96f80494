"""Finds the work of a worker's trainers: jobs that it claims, or a base model that inference requests wait for."""

from __future__ import annotations

import time
from dataclasses import dataclass

from catalog.clock import boot_seconds
from catalog.inference import engines
from catalog.queue import claiming
from catalog.queue.claiming import Claim
from catalog.scheduling.snapshot import Capacity
from catalog.tables.jobs import Job
from catalog.tables.table import new_id
from worker.context.context import WorkerContext
from worker.gang.gang import WorkerGang
from worker.session.base_load import BaseLoad
from worker.session.capacity import bases_to_load, capacity_report, free_capacity
from worker.session.sharding import BaseToLoad
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
