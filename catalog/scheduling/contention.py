"""Workers that decide at once: who would be chosen first were those before taken, and the picture without those.

A job that is taken counts as one that goes before did, so all of them come to one order of turns, and each takes the
first that is left: what one after the other would take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from catalog.scheduling.ordering import Turn
from catalog.scheduling.packing import for_what_is_loaded
from catalog.scheduling.snapshot import Candidate, Picture, Policy, Service, Share

MAX_TURNS = 32
"""So many are known ahead."""


def in_turn(picture: Picture, turns: Sequence[Turn], first: Turn, policy: Policy) -> tuple[str, ...]:
    """`first`, which is chosen first, and who probably would be without it, and so on: ids of jobs.

    They end where a job of which nothing was read may come before the next.
    """
    found: list[str] = []
    read: Counter[tuple[str, int]] = Counter()
    for job in _like(picture, turns, first, policy):
        found.append(job.job_id)
        read[job.project_id, job.priority] += 1
        if len(found) == MAX_TURNS or read[job.project_id, job.priority] == picture.per_group:
            break
    return tuple(found)


def without(picture: Picture, passed: Collection[str]) -> Picture:
    """As if other workers, each like the one of this picture, had just begun these of its jobs."""
    shares = dict(picture.shares)
    served: dict[tuple[str, int], float] = {}
    for job in {job.job_id: job for job in picture.candidates if job.job_id in passed}.values():
        share = shares.get(job.project_id, Share())
        shares[job.project_id] = replace(
            share, num_running=share.num_running + 1, devices_held=share.devices_held + 1.0
        )
        served[job.project_id, job.priority] = picture.now
    recomputes, whole = picture.room.recomputes, max(picture.worker_bytes, picture.room.memory_bytes_free)
    given = Service(at=served, memory_bytes=whole, recomputes=recomputes, group=picture.room.group)
    return replace(picture, shares=shares, served=(*picture.served, given), taken=passed)


def _like(picture: Picture, turns: Sequence[Turn], first: Turn, policy: Policy) -> Iterable[Candidate]:
    """Of the turns from the first on those that could be chosen first in its place."""
    room, key = picture.room, picture.live_key
    if key is not None:
        after = (turn.candidate for turn in turns[first.position - 1 :])
        fit = (job for job in after if room.cost(job, num_before=room.num_jobs) <= room.memory_bytes_free)
        return (job for job in fit if job.pack_key == key and not job.is_suspect and room.may_join(job))
    fitting = [turn for turn in turns if room.alone(turn.candidate) <= room.memory_bytes_free]
    loaded = for_what_is_loaded(fitting, room, patience_seconds=policy.patience_seconds)
    return (turn.candidate for turn in loaded or fitting)
