"""The free capacity of a worker: alongside the jobs of its trainer, or for a new trainer."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager

from catalog.errors import LorryError
from catalog.fleet import workers
from catalog.inference import engines
from catalog.resources import memory, throughput
from catalog.scheduling.snapshot import Capacity
from catalog.tables.table import new_id
from worker.context.context import WorkerContext
from worker.node import devices
from worker.process.launcher import TrainerProcess
from worker.protocol.mailbox import Json
from worker.session.sharding import BaseToLoad, base_demand
from worker.session.trainer_session import TrainerSession

log = logging.getLogger(__name__)


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
