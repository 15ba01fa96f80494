"""What a worker has free for jobs: beside those of its trainer, or for a new one."""

from __future__ import annotations

from catalog.resources import memory, throughput
from catalog.scheduling.snapshot import Room
from catalog.tables import Json
from worker.context.context import WorkerContext
from worker.node import devices
from worker.session.trainer_session import Pack


def room_of(context: WorkerContext, pack: Pack | None = None) -> Room:
    """What fits beside the pack. An empty trainer's base counts as free: the next job needs it, or it is unloaded. So
    does what stands by in a CPU's memory, for it becomes the trainer."""
    free_bytes, group = context.free_bytes(), context.group
    tick_tokens = memory.tick_tokens(context.device.kind, num_lanes=devices.num_threads())
    max_jobs = _places(context, pack)
    if pack is None:
        by_itself = context.standby is not None and context.device.kind == "cpu"
        free_bytes += context.standby.memory_bytes() if context.standby is not None and by_itself else 0
        return Room(
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
    return Room(
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


def told_room(room: Room) -> Json:
    """With the next heartbeat, for who decides about the worker."""
    names = ("max_jobs", "memory_bytes_free", "holding")
    return {name: getattr(room, name) for name in names}


def _places(context: WorkerContext, pack: Pack | None) -> int:
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
