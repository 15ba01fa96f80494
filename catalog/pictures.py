"""The picture that a decision is made from: of the queue as it is in this transaction.

What is read are the first of each project and class, by heads.py: enough to decide as if all were looked at.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import get_args

from sqlalchemy import select
from sqlalchemy.orm import Session

from catalog import fleet, heads, usage
from catalog.db import read_clock
from catalog.heads import Such
from catalog.scheduling.decide import leading
from catalog.scheduling.picture import Candidate, Picture, Policy, Room
from catalog.spec import Quantisation
from catalog.states import MAX_COUNTED_ATTEMPTS
from catalog.tables import Attempt, Job, Worker


def of_worker(
    session: Session, worker: Worker | None, *, trainer_id: str, room: Room, live_key: str | None, policy: Policy
) -> Picture:
    """For a worker that has this room: beside the jobs of its trainer `trainer_id`, whose pack key is `live_key`, or
    (None) for a trainer's first jobs."""
    now = read_clock(session)
    picture = Picture(
        now=now,
        candidates=(),
        shares=usage.shares_of_waiting(session, now=now, policy=policy),
        served_at=usage.served_at(session),
        room=room,
        live_key=live_key,
        worker_bytes=worker.memory_bytes if worker else room.memory_bytes_free,
        has_suspect=live_key is not None and _holds_suspect(session, trainer_id),
    )
    if picture.has_suspect:
        return picture
    can_load = fleet.quantisations_of(worker) if worker is not None else frozenset({"none"})
    picture = _with(picture, _firsts(session, picture, can_load))
    for_whom = live_key or room.resident_key
    if for_whom is not None:
        picture = _with(picture, _alike(session, picture, for_whom))
    lead = leading(picture, policy) if live_key is None else None
    if lead is None or lead.candidate.pack_key == for_whom:
        return picture
    return _with(picture, _alike(session, picture, lead.candidate.pack_key))


def _with(picture: Picture, found: list[Candidate]) -> Picture:
    return replace(picture, candidates=(*picture.candidates, *found))


def _firsts(session: Session, picture: Picture, can_load: Collection[str]) -> list[Candidate]:
    """Of each project and class those that stand first of what the worker holds, each with a trainer to itself.

    Of those that may come before one that joins, as many as can.
    """
    room, is_live = picture.room, picture.live_key is not None
    missing = tuple(name for name in get_args(Quantisation) if name not in can_load)
    such = Such(alone=True, recomputes=room.recomputes, not_held_as=missing)
    num_bytes = picture.worker_bytes if is_live else room.memory_bytes_free
    per_group = room.max_jobs + 1 if is_live else 1
    return heads.waiting(session, such, now=picture.now, per_group=per_group, num_bytes=num_bytes)


def _alike(session: Session, picture: Picture, key: str) -> list[Candidate]:
    """Of each project and class as many of that pack key as there is room for, the first of those that fit."""
    room = picture.room
    such = Such(alike=True, alone=picture.live_key is None, recomputes=room.recomputes)
    looked = {"per_group": room.max_jobs, "num_bytes": room.memory_bytes_free}
    return heads.waiting(session, such, now=picture.now, key=key, **looked)


def _holds_suspect(session: Session, trainer_id: str) -> bool:
    live = select(Attempt.job_id).where(Attempt.trainer_id == trainer_id, Attempt.ended_at.is_(None))
    held = select(Job.counted_attempts).where(Job.id.in_(session.scalars(live).all()))
    return any(number >= MAX_COUNTED_ATTEMPTS - 1 for number in session.scalars(held))
