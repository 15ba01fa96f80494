"""The picture that a decision is made from: of the queue as it is in this transaction.

What is read are the first of each project and class, by heads.py: enough to decide as if all were looked at.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import get_args

from sqlalchemy import select
from sqlalchemy.orm import Session

from catalog.fleet import views
from catalog.lifecycle import candidates as heads
from catalog.lifecycle.candidates import Such
from catalog.queue import charging
from catalog.resources.sharding import Holding
from catalog.scheduling.contention import MAX_TURNS
from catalog.scheduling.packing import spare_bytes
from catalog.scheduling.scheduler import decide
from catalog.scheduling.snapshot import Candidate, Picture, Policy, Room
from catalog.spec.job import Quantisation
from catalog.states import is_suspect
from catalog.tables import Attempt, Job, Worker


def of_worker(
    session: Session,
    worker: Worker | None,
    *,
    trainer_id: str,
    room: Room,
    live_key: str | None,
    now: float,
    policy: Policy,
) -> Picture:
    """For a worker that has this room: beside the jobs of its trainer `trainer_id`, whose pack key is `live_key`, or
    (None) for a trainer's first jobs."""
    whole = worker.memory_bytes if worker else room.memory_bytes_free
    waiting = charging.shares_of_waiting(session, now=now, policy=policy)
    picture = Picture(
        now=now,
        candidates=(),
        shares=waiting,
        served=charging.served(session, now=now),
        room=room,
        live_key=live_key,
        worker_bytes=whole if room.memory_bytes_when_empty is None else min(whole, room.memory_bytes_when_empty),
        has_suspect=live_key is not None and _holds_suspect(session, trainer_id),
        per_group=math.ceil(MAX_TURNS / max(1, len(waiting))),
    )
    if picture.has_suspect:
        return picture
    can_load = views.quantisations_of(worker) if worker is not None else frozenset({"none"})
    picture = _with(picture, _firsts(session, picture, can_load))
    for_whom = live_key or room.resident_key
    if for_whom is not None:
        found = _alike(session, picture, for_whom, room.memory_bytes_free, holding=room.holding)
        picture = _with(picture, found)
    return with_mates(session, picture, policy)


def _with(picture: Picture, found: list[Candidate]) -> Picture:
    return replace(picture, candidates=(*picture.candidates, *found))


def with_mates(session: Session, picture: Picture, policy: Policy) -> Picture:
    """And those of the anchor's kind that may be let in beside what is chosen already: the first of those that fit into
    what is left, again and again until there is none. So larger ones that wait before them hide nobody."""
    for _ in range(picture.room.max_jobs if picture.room.max_jobs > 1 else 0):
        choices = decide(picture, policy).action.choices
        if not choices or len(choices) >= picture.room.max_jobs or choices[0].turn.candidate.is_suspect:
            break
        key = choices[0].turn.candidate.pack_key
        holding = picture.room.holding
        if picture.live_key is None:
            holding = picture.room.holding_for(choices[0].turn.candidate)
        spare = spare_bytes(choices, picture.room)
        found = _alike(session, picture, key, spare, is_beside=True, holding=holding)
        seen = {candidate.job_id for candidate in picture.candidates}
        if all(candidate.job_id in seen for candidate in found):
            break
        picture = _with(picture, found)
    return picture


def _firsts(session: Session, picture: Picture, can_load: Collection[str]) -> list[Candidate]:
    """Of each project and class those that stand first of what the worker holds, each with a trainer to itself.

    Of those that may come before one that joins, as many as can. For a new trainer also the first that fit into what is
    free: the others are there because the worker holds them, so that who goes before them takes no turn of theirs. And
    more than one decision needs, for those of which other workers take some meanwhile.
    """
    room, is_live = picture.room, picture.live_key is not None
    missing = tuple(name for name in get_args(Quantisation) if name not in can_load)
    such = Such(alone=True, recomputes=room.recomputes, not_held_as=missing)

    def look(per_group: int, num_bytes: int) -> list[Candidate]:
        return heads.waiting(session, such, now=picture.now, per_group=per_group, num_bytes=num_bytes, group=room.group)

    per_group = picture.per_group or 1
    if is_live:
        return look(max(room.max_jobs + 1, per_group), picture.worker_bytes)
    found = look(per_group, max(picture.worker_bytes, room.memory_bytes_free))
    if all(room.alone(candidate) <= room.memory_bytes_free for candidate in found):
        return found
    return [*found, *look(per_group, room.memory_bytes_free)]


def _alike(
    session: Session, picture: Picture, key: str, num_bytes: int, *, holding: Holding, is_beside: bool = False
) -> list[Candidate]:
    """Of each project and class as many of that pack key as there is room for, the first of those that fit: beside
    others, or by themselves. holding: how the trainer holds the base."""
    room = picture.room
    is_alone = picture.live_key is None and not is_beside
    such = Such(alike=True, alone=is_alone, recomputes=room.recomputes, holding=holding)
    per_group = room.max_jobs + len(picture.taken) if is_beside else max(room.max_jobs, picture.per_group or 1)
    return heads.waiting(
        session, such, now=picture.now, key=key, per_group=per_group, num_bytes=num_bytes, group=room.group
    )


def _holds_suspect(session: Session, trainer_id: str) -> bool:
    live = select(Attempt.job_id).where(Attempt.trainer_id == trainer_id, Attempt.ended_at.is_(None))
    held = select(Job.counted_attempts, Job.lost_attempts).where(Job.id.in_(session.scalars(live).all()))
    return any(is_suspect(counted, lost) for counted, lost in session.execute(held))
