"""A worker's operations on inference requests: claim, renew and release them, and find a base model to load."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sqlalchemy import ColumnElement, Select, Text, and_, case, cast, func, select, true, update
from sqlalchemy.orm import Session, aliased

from catalog.db import lease
from catalog.db.database import Database, read_clock, serialize, skip_locked
from catalog.fleet import views
from catalog.resources.pack_key import quantization_of
from catalog.tables.fleet import Worker
from catalog.tables.inference import MAX_CLAIMS, MAX_SECONDS, InferenceRequest
from catalog.tables.table import Json

MAX_BASES = 16
"""Maximum number of base models that a worker considers for loading at once."""
FAILED = {
    "code": "inference_failed",
    "message": "The request could not be answered: every worker that began to answer it failed.",
    "remedy": "Send a shorter request, or ask an operator to check the logs of the workers.",
}
"""The error of a request that MAX_CLAIMS workers could not answer."""
UNPROCESSABLE = {
    "code": "unprocessable_request",
    "message": "The request could not be passed to a trainer: its JSON is nested too deeply, or a value in it has the "
    "wrong type.",
    "remedy": "Remove levels of nesting from 'messages' and 'tools', and send the request again.",
}
"""The error of a request whose body a worker can't read or write. The same body fails on every worker."""
IS_BATCH = case((InferenceRequest.batch_id.is_(None), 0), else_=1)
"""In a query: 1 for a request of a batch, else 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceClaim:
    """A request that this worker answers."""

    claim_id: str
    request_id: str
    adapter: str | None
    """Digest of the adapter's manifest."""
    body: Json | None
    """None: it can't be read."""
    reply_to: str
    is_last: bool
    """If this worker can't answer either, the request fails."""
    is_batch: bool
    """It belongs to a batch."""

    @property
    def num_answers(self) -> int:
        """How many answers the request asks for."""
        return 1 if self.body is None else _num_answers(self.body)


@dataclass(frozen=True, kw_only=True, slots=True)
class WantedBase:
    """A base model that requests wait for."""

    base_model: str
    base_digest: str
    pack_key: str


def claim(
    db: Database, *, worker_id: str, pack_key: str, limit: int, batch_limit: int | None = None, lease_seconds: float
) -> list[InferenceClaim]:
    """Claim requests that a trainer with this pack key can answer, until they ask for `limit` answers together.

    The last request may exceed the limit. batch_limit: the limit for requests of batches. Those are claimed after all
    others. Among the others, and among those of batches, the projects take turns, so that no project's requests wait
    behind all those of another.
    """
    batch_limit = limit if batch_limit is None else min(batch_limit, limit)
    with db.read() as session:  # most polls find nothing, and a read transaction blocks no writer
        waiting = _free(now=read_clock(session)).where(InferenceRequest.pack_key == pack_key)
        waiting = waiting.where(InferenceRequest.batch_id.is_(None)) if batch_limit <= 0 else waiting
        if session.scalar(waiting.limit(1)) is None:
            return []
    with db.write() as session:
        now = read_clock(session)
        if _takes_nothing_new(session, worker_id):
            return []
        ids = _in_turns(session, pack_key, limit, batch_limit, now=now)
        found = {row.id: (row, body) for row, body in session.execute(skip_locked(_with_bodies(ids, now=now)))}
        claimed: list[InferenceClaim] = []
        for row, body in (found[ident] for ident in ids if ident in found):
            if _is_full(claimed, limit, batch_limit, for_batch=row.batch_id is not None):
                break
            claimed.append(_claim(row, body, now=now, lease_seconds=lease_seconds))
        return claimed


def reserve(db: Database, *, worker_id: str, pack_key: str, lease_seconds: float) -> InferenceClaim | None:
    """Claim the first request that waits for a base model that this worker is to load.

    Returns None if another worker answers such requests or is about to, or if none waits.
    """
    with db.write() as session:
        now = read_clock(session)
        if _takes_nothing_new(session, worker_id):
            return None
        serialize(session, f"reserve {pack_key}")
        ids = _in_turns(session, pack_key, 1, 1, now=now)
        found = session.execute(skip_locked(_with_bodies(ids, now=now))).first()
        held = select(InferenceRequest.id).where(
            InferenceRequest.pack_key == pack_key, InferenceRequest.lease_expires_at > now
        )
        if found is None or session.scalar(held.limit(1)) is not None:
            return None
        return _claim(found[0], found[1], now=now, lease_seconds=lease_seconds)


def renew(db: Database, claim_ids: Collection[str], *, lease_seconds: float) -> set[str]:
    """Extend the leases. Returns the claims that are stale: their requests were deleted, or released."""
    if not claim_ids:
        return set()
    with db.write() as session:
        until = read_clock(session) + lease_seconds
        own = InferenceRequest.claim_id.in_(claim_ids)
        session.execute(update(InferenceRequest).where(own).values(lease_expires_at=until))
        held = set(session.scalars(select(InferenceRequest.claim_id).where(own)))
    return set(claim_ids) - held


def release(db: Database, claim_ids: Sequence[str], *, counts: bool = True) -> None:
    """Release requests that this worker does not answer, so that another one can.

    counts: the request may be the cause. False for a worker that shuts down or unloads the base model.
    """
    if not claim_ids:
        return
    with db.write() as session:
        own = InferenceRequest.claim_id.in_(claim_ids)
        free: dict[str, Any] = {"claim_id": None, "lease_expires_at": None}
        free["expires_at"] = extended(now=read_clock(session))
        if not counts:
            free["num_claims"] = InferenceRequest.num_claims - 1
        session.execute(update(InferenceRequest).where(own).values(**free))


def extended(*, now: float) -> ColumnElement[float]:
    """Return until when a released request may wait for another worker. The lines of a batch wait as long as before."""
    earliest = now + MAX_SECONDS
    is_shorter = and_(InferenceRequest.batch_id.is_(None), InferenceRequest.expires_at < earliest)
    return case((is_shorter, earliest), else_=InferenceRequest.expires_at)


def unloaded(
    db: Database, *, worker_id: str, waited_seconds: float = 0.0, with_batches: bool = True
) -> list[WantedBase]:
    """Return the base models of requests that no trainer can answer and no worker is loading one for, oldest first.

    Base models that only batches wait for are last. Those with a quantization that this worker does not support are
    omitted. waited_seconds: newer requests do not count. with_batches: whether requests of batches count.
    """
    with db.read() as session:
        now = read_clock(session)
        if _takes_nothing_new(session, worker_id):
            return []
        residents = views.residents(session, now=now)
        loaded = {each.pack_key for each in residents if each.pack_key is not None and not each.takes_nothing_new}
        other = aliased(InferenceRequest)
        claimed = select(other.id).where(other.pack_key == InferenceRequest.pack_key, other.lease_expires_at > now)
        waiting = (
            _free(now=now)
            .where(InferenceRequest.pack_key.not_in(loaded), ~claimed.exists())
            .where(InferenceRequest.created_at <= now - waited_seconds, true() if with_batches else IS_BATCH == 0)
            .with_only_columns(
                InferenceRequest.pack_key, func.min(InferenceRequest.base_model), func.min(InferenceRequest.base_digest)
            )
            .group_by(InferenceRequest.pack_key)
            .order_by(func.min(IS_BATCH), func.min(InferenceRequest.created_at))
        )
        worker = session.get(Worker, worker_id)
        can_load = worker.quantizations if worker is not None else frozenset({"none"})
        wanted = (
            WantedBase(base_model=name, base_digest=digest, pack_key=key)
            for key, name, digest in session.execute(waiting)
            if quantization_of(key) in can_load
        )
        return list(islice(wanted, MAX_BASES))


def _takes_nothing_new(session: Session, worker_id: str) -> bool:
    worker = session.get(Worker, worker_id)
    return worker is not None and worker.takes_nothing_new


def _free(*, now: float) -> Select[InferenceRequest]:
    return select(InferenceRequest).where(_is_claimable(now=now), InferenceRequest.expires_at > now)


def _is_claimable(*, now: float) -> ColumnElement[bool]:
    return and_(lease.is_free(InferenceRequest, now=now), InferenceRequest.num_claims < MAX_CLAIMS)


def _with_bodies(ids: Sequence[str], *, now: float) -> Select[InferenceRequest, str]:
    """Select the requests with their bodies as text, so that a body that can't be parsed affects no other request."""
    is_free = (_is_claimable(now=now), InferenceRequest.expires_at > now)
    return select(InferenceRequest, cast(InferenceRequest.body, Text)).where(*is_free, InferenceRequest.id.in_(ids))


def _in_turns(session: Session, pack_key: str, limit: int, batch_limit: int, *, now: float) -> list[str]:
    """Return the ids of the first requests: the oldest of each project, then the second of each, and so on. Requests
    that are being answered count as the first ones of their project. Requests of batches are last."""
    is_free = case((_is_claimable(now=now), 1), else_=0)
    turn = func.row_number().over(
        partition_by=(InferenceRequest.project_id, IS_BATCH),
        order_by=(is_free, InferenceRequest.created_at, InferenceRequest.id),
    )
    columns = (InferenceRequest.id, InferenceRequest.created_at, is_free.label("is_free"), IS_BATCH.label("is_batch"))
    of_trainer = (InferenceRequest.pack_key == pack_key, InferenceRequest.expires_at > now)
    ranked = select(*columns, turn.label("turn")).where(*of_trainer).subquery()
    first = select(ranked.c.id).where(ranked.c.is_free == 1).order_by(ranked.c.turn, ranked.c.created_at)
    interactive = list(session.scalars(first.where(ranked.c.is_batch == 0).limit(limit)))
    num_of_batches = min(batch_limit, limit - len(interactive))
    if num_of_batches <= 0:
        return interactive
    return interactive + list(session.scalars(first.where(ranked.c.is_batch == 1).limit(num_of_batches)))


def _is_full(claimed: Sequence[InferenceClaim], limit: int, batch_limit: int, *, for_batch: bool) -> bool:
    """Return whether the limits of `claim` are reached. Requests of batches are claimed after all others."""
    num_of_batches = sum(each.num_answers for each in claimed if each.is_batch)
    return sum(each.num_answers for each in claimed) >= limit or (for_batch and num_of_batches >= batch_limit)


def _num_answers(body: Json) -> int:
    return int(body.get("n", 1)) * len(body.get("prompts", ("messages",)))


def _parsed(body: str) -> Json | None:
    """Return the body of a request. None if it can't be parsed, or if the number of its answers can't be counted."""
    try:
        parsed: Json = json.loads(body)
        _num_answers(parsed)
    except (ValueError, RecursionError, TypeError, AttributeError):
        return None
    return parsed


def _claim(row: InferenceRequest, body: str, *, now: float, lease_seconds: float) -> InferenceClaim:
    row.num_claims += 1
    return InferenceClaim(
        claim_id=lease.acquire(row, now=now, lease_seconds=lease_seconds, prefix="answer"),
        request_id=row.id,
        adapter=row.adapter,
        body=_parsed(body),
        reply_to=row.reply_to,
        is_last=row.num_claims >= MAX_CLAIMS,
        is_batch=row.batch_id is not None,
    )
