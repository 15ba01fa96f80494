"""What a worker has free for jobs: beside those of its trainer, or for a new one."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager

from catalog.errors import LorryError
from catalog.fleet import workers
from catalog.resources import memory, throughput
from catalog.scheduling.snapshot import Capacity
from worker.context.context import WorkerContext
from worker.node import devices
from worker.process.launcher import TrainerProcess
from worker.protocol.mailbox import Json
from worker.session.trainer_session import TrainerSession

log = logging.getLogger(__name__)


def room_of(context: WorkerContext, pack: TrainerSession | None = None) -> Capacity:
    """What fits beside the pack. An empty trainer's base counts as free: the next job needs it, or it is unloaded. So
    does what stands by in a CPU's memory, for it becomes the trainer."""
    free_bytes, group = context.free_bytes(), context.group
    tick_tokens = memory.tick_tokens(context.device.kind, num_lanes=devices.num_threads())
    max_jobs = _places(context, pack)
    if pack is None:
        by_itself = context.standby is not None and context.device.kind == "cpu"
        free_bytes += context.standby.memory_bytes() if context.standby is not None and by_itself else 0
        return Capacity(
            max_jobs=max_jobs,
            memory_bytes_free=free_bytes,
            tick_tokens=tick_tokens,
            recomputes=context.device.recomputes,
            group=group,
        )
    when_empty = free_bytes + pack.held_bytes()
    if pack.ready is not None:
        when_empty += group.reserve_bytes
    if not len(pack) and pack.ready is not None:
        free_bytes += int(pack.ready["memory"]["base_bytes"]) + group.reserve_bytes
    return Capacity(
        max_jobs=max_jobs,
        memory_bytes_free=max(0, free_bytes - pack.bytes_to_come()),
        memory_bytes_when_empty=when_empty,
        resident_key=pack.pack_key,
        num_jobs=len(pack),
        tick_tokens=tick_tokens,
        recomputes=context.device.recomputes,
        group=group,
        holding=pack.holding,
    )


def told_room(room: Capacity) -> Json:
    """With the next heartbeat, for who decides about the worker."""
    names = ("max_jobs", "memory_bytes_free", "holding")
    return {name: getattr(room, name) for name in names}


def _places(context: WorkerContext, pack: TrainerSession | None) -> int:
    """Jobs that may join before one of the trainer would be slowed down by more than the operator allows. What is
    decided of a trainer goes with the next heartbeat, so that people can be told why a job waits."""
    settings = context.settings
    num_jobs, speeds = (len(pack), pack.speeds) if pack is not None else (0, throughput.UNKNOWN)
    places = throughput.free_places(
        num_jobs,
        speeds,
        max_slowdown=settings.max_slowdown,
        at_most=max(0, settings.max_jobs_per_trainer - num_jobs),
    )
    if pack is not None:
        context.pulse.status["report"] |= {"saturation": throughput.described(num_jobs, speeds, settings, places)}
    return places


@contextmanager
def announced(
    context: WorkerContext, trainer: TrainerProcess, pack: TrainerSession, base_digest: str
) -> Generator[None]:
    """The trainer is on record, and lives by the worker's heartbeat."""
    trainer_id, pack_key = pack.trainer_id, pack.pack_key
    named = {"trainer_id": trainer_id, "worker_id": context.worker_id, "base_digest": base_digest}
    workers.register_trainer(context.db, **named, pack_key=pack_key, report=_group(context))
    context.pulse.status |= {"resident_base": base_digest, "trainer_id": trainer_id, "report": {}}
    context.pulse.guard(on_beat=trainer.pulse, on_lost=trainer.kill)
    try:
        yield
    finally:
        context.pulse.guard(on_beat=None, on_lost=None)
        context.pulse.status |= {"resident_base": None, "trainer_id": None}
        exit_report = {"exit_status": trainer.returncode, **_speeds(context)}
        try:
            workers.end_trainer(context.db, trainer_id, report=exit_report)
        except LorryError as error:  # it is on record as one whose worker knows no more of it
            log.warning("Not recorded: %s", error)


def _group(context: WorkerContext) -> Json:
    """The devices that it has, and the workers of the gang that lend theirs."""
    device = context.device.as_json()
    group = {"group": {name: device[name] for name in ("indices", "cores")}}
    if context.gang is None or context.gang.round is None:
        return group
    return group | {"gang": {"name": context.gang.place.gang, "workers": context.gang.round.workers}}


def _speeds(context: WorkerContext) -> Json:
    """What the trainer has learnt of its ticks: for plans of jobs on its base."""
    told = context.pulse.status["report"].get("tick_speeds")
    return {"tick_speeds": told} if told else {}
