"""The audit log as a chain: each event's digest covers the event before it, so that no one of them changes unseen.

Events are sealed in batches by a chore, and not as they are written: else whoever changes anything would wait for
whoever changes anything else. Until then an event is in the table, and not yet in the chain.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import rfc8785
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from catalog.db import Database, serialise
from catalog.tables import AuditEvent, AuditHead, Json

GENESIS = "0" * 64
"""What the first event has for the digest of the one before."""
LARGEST = 2**53 - 1
"""Of RFC 8785's whole numbers."""
SEALED_AT_ONCE = 500
CHECKED_AT_ONCE = 5_000
Fault = Literal["changed", "missing", "misplaced"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Misfit:
    """The first event that doesn't fit, by its place in the chain; `id` None where it isn't there."""

    link: int
    id: str | None
    fault: Fault


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """Some of the chain, looked at anew."""

    num_events: int
    last_link: int
    last_digest: str
    has_more: bool
    misfit: Misfit | None
    num_unsealed: int


def content(event: AuditEvent) -> Json:
    """What an event says, as it is told and as its digest covers it: all but the digest itself."""
    actor = {"type": event.actor_type, "id": event.actor_id, "name": event.actor_name}
    return {
        "object": "audit_event",
        "id": event.id,
        "type": event.type,
        "effective_at": event.effective_at,
        "actor": actor,
        "project_id": event.project_id,
        "object_id": event.object_id,
        "request_id": event.request_id,
        "address": event.address,
        "details": event.details,
        "link": event.link,
        "previous": event.previous,
    }


def digest(told: Json) -> str:
    """Of what `content` gives. What is null is left out, so that a field that comes later changes no digest."""
    return hashlib.sha256(rfc8785.dumps(_without_nulls(told))).hexdigest()


def seal(db: Database) -> int:
    """Take what was written since into the chain, in the order of writing. Returns how many."""
    num_sealed = 0
    while True:
        with db.read() as session:  # most looks find nothing, and keep nobody from writing
            if session.scalar(select(AuditEvent.seq).where(AuditEvent.link.is_(None)).limit(1)) is None:
                return num_sealed
        with db.write() as session:
            num_sealed += _seal_some(session)


def check(db: Database, *, after: int = 0, limit: int = CHECKED_AT_ONCE) -> Checked:
    """Compute the digests behind the place `after` anew, at most so many of them."""
    with db.read() as session:
        end, noted = _head(session)
        walk = _walk(session, after=after, limit=limit)
        if walk.link > end:  # sealed since; or somebody has set the head back
            end, noted = _head(session)
        return Checked(
            num_events=walk.link - after,
            last_link=walk.link,
            last_digest=walk.digest,
            has_more=walk.misfit is None and walk.link < end,
            misfit=walk.misfit or _against_head(session, walk, end, noted, is_whole=walk.link == after + limit),
            num_unsealed=session.scalar(select(func.count()).where(AuditEvent.link.is_(None))) or 0,
        )


def lines(db: Database) -> Iterator[Json]:
    """Every sealed event with its digest, in the order of the chain; read in pages."""
    last = 0
    while True:
        with db.read() as session:
            page = _sealed(session, after=last, limit=SEALED_AT_ONCE)
        yield from ({**content(event), "digest": event.digest} for event in page)
        if len(page) < SEALED_AT_ONCE:
            return
        last = page[-1].link or 0


def _seal_some(session: Session) -> int:
    serialise(session, "audit chain")
    head = session.get(AuditHead, 1, with_for_update=True, populate_existing=True)
    if head is None:
        head = AuditHead(id=1, link=0, digest=GENESIS)
        session.add(head)
    unsealed = select(AuditEvent).where(AuditEvent.link.is_(None)).order_by(AuditEvent.seq).limit(SEALED_AT_ONCE)
    events = list(session.scalars(unsealed))
    for event in events:
        head.link += 1
        event.link, event.previous = head.link, head.digest
        event.details = _within_json(event.details)
        event.digest = head.digest = digest(content(event))
    return len(events)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Walk:
    """How far the chain fits."""

    link: int
    digest: str
    misfit: Misfit | None = None


def _walk(session: Session, *, after: int, limit: int) -> _Walk:
    digest_before = GENESIS if after == 0 else session.scalar(select(AuditEvent.digest).where(AuditEvent.link == after))
    if digest_before is None:
        return _Walk(link=after, digest=GENESIS, misfit=Misfit(link=after, id=None, fault="missing"))
    walk = _Walk(link=after, digest=digest_before)
    for event in _sealed(session, after=after, limit=limit):
        fault = _fault(event, walk)
        if fault is not None:
            ident = None if fault == "missing" else event.id
            return replace(walk, misfit=Misfit(link=walk.link + 1, id=ident, fault=fault))
        walk = _Walk(link=walk.link + 1, digest=event.digest or "")
    return walk


def _fault(event: AuditEvent, before: _Walk) -> Fault | None:
    if event.link != before.link + 1:
        return "missing"
    if event.digest != digest(content(event)):
        return "changed"
    return None if event.previous == before.digest else "misplaced"


def _against_head(session: Session, walk: _Walk, end: int, noted: str, *, is_whole: bool) -> Misfit | None:
    """Whether the chain ends where the last sealing left it."""
    if walk.link < end:
        return None if is_whole else Misfit(link=walk.link + 1, id=None, fault="missing")
    if walk.link > end or walk.digest != noted:
        ident = session.scalar(select(AuditEvent.id).where(AuditEvent.link == walk.link))
        return Misfit(link=walk.link, id=ident, fault="misplaced")
    return None


def _head(session: Session) -> tuple[int, str]:
    row = session.execute(select(AuditHead.link, AuditHead.digest)).first()
    return (row.link, row.digest) if row is not None else (0, GENESIS)


def _sealed(session: Session, *, after: int, limit: int) -> list[AuditEvent]:
    beyond = select(AuditEvent).where(AuditEvent.link > after)
    return list(session.scalars(beyond.order_by(AuditEvent.link).limit(limit)))


def _without_nulls(told: Json) -> Json:
    """Of an event and of its actor; `details` stay as they are."""
    kept = {name: value for name, value in told.items() if value is not None}
    return {**kept, "actor": {name: value for name, value in told["actor"].items() if value is not None}}


def _within_json(value: Any) -> Any:
    """As text what RFC 8785 has no form for: large numbers, those that are none, and halves of a surrogate pair.
    Whatever was noted can be sealed, and what follows it."""
    if isinstance(value, dict):
        return {_well_formed(name): _within_json(inner) for name, inner in cast(Json, value).items()}
    if isinstance(value, list):
        return [_within_json(inner) for inner in cast(list[Any], value)]
    if isinstance(value, str):
        return _well_formed(value)
    is_beyond = (isinstance(value, int) and abs(value) > LARGEST) or (
        isinstance(value, float) and not math.isfinite(value)
    )
    return str(value) if is_beyond else value


def _well_formed(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
