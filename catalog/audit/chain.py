"""The hash chain of the audit log: each event's digest covers the previous event, under a key of the API servers.

The key is derived from the pepper, so a database password is not enough to forge a digest. Anchors
(catalog.maintenance.audit_anchors) reveal events that are missing at the end. API servers seal events in batches
rather than in the writing transactions, because writers would wait for each other. An unsealed event is in the table
but not yet in the chain.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import rfc8785
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from catalog.audit import derived_keys
from catalog.audit.derived_keys import ChainKey
from catalog.db.database import Database, serialize
from catalog.tables.table import Json
from catalog.tables.tenancy import AuditEvent, AuditHead, RetiredKey

GENESIS = "0" * 64
"""The previous digest of the first event."""
LARGEST = 2**53 - 1
"""Largest integer of RFC 8785."""
SEALED_AT_ONCE = 500
"""Maximum number of events that one transaction seals."""
CHECKED_AT_ONCE = 5_000
Fault = Literal["changed", "missing", "misplaced", "anchor_changed"]
"""changed: the event differs from the sealed one, or its pepper is unknown. anchor_changed: the same for an anchor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Misfit:
    """The first event that breaks the chain, by its link number. `id` is None if the event is missing."""

    link: int
    id: str | None
    fault: Fault


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainCheck:
    """Result of verifying a part of the chain."""

    num_events: int
    last_link: int
    last_digest: str
    has_more: bool
    misfit: Misfit | None
    num_unsealed: int


def content(event: AuditEvent) -> Json:
    """Return an event as the API returns it, without the digest. The digest covers this content."""
    actor = {"type": event.actor_type, "id": event.actor_id, "name": event.actor_name}
    fields = {
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
    return cast(Json, _within_json(fields))


def seal_of(fields: Mapping[str, Any], key: bytes) -> str:
    """Return the HMAC-SHA256 of the RFC 8785 form without nulls, so that fields added later change no digest."""
    return hmac.new(key, rfc8785.dumps(_without_nulls(fields)), hashlib.sha256).hexdigest()


def is_sealed(fields: Mapping[str, Any], seal: object, keys: Iterable[ChainKey], *, at: tuple[int, str]) -> bool:
    """Return whether the seal was made with one of the keys that are valid for this link and digest."""
    return any(key.covers(*at) and hmac.compare_digest(str(seal), seal_of(fields, key.key)) for key in keys)


def seal(db: Database, *, pepper: bytes, at_most: int | None = None) -> int:
    """Append unsealed events to the chain, in the order in which they were written. Returns their number.

    at_most: stop after about this number; the next call seals the others. Raises PepperReplaced.
    """
    num_sealed = 0
    while at_most is None or num_sealed < at_most:
        with db.read() as session:  # usually every event is sealed: then no writer has to wait
            if session.scalar(select(AuditEvent.seq).where(AuditEvent.link.is_(None)).limit(1)) is None:
                break
        with db.write() as session:
            num_sealed += _seal_some(session, pepper)
    return num_sealed


def check(db: Database, *, peppers: Sequence[bytes], after: int = 0, limit: int = CHECKED_AT_ONCE) -> ChainCheck:
    """Verify at most `limit` digests of the chain after the link `after`.

    peppers: the current one first. It also verifies events that were sealed under replaced peppers (derived_keys).
    Without any pepper, only the references from each event to the previous one are verified.
    """
    with db.snapshot() as session:
        end, noted = head(session)
        keys = derived_keys.chain_keys(derived_keys.wire_rows(session), peppers)
        walk = _walk(session, keys, after=after, limit=limit)
        return ChainCheck(
            num_events=walk.link - after,
            last_link=walk.link,
            last_digest=walk.digest,
            has_more=walk.misfit is None and walk.link < end,
            misfit=walk.misfit or _against_head(session, walk, end, noted, is_whole=walk.link == after + limit),
            num_unsealed=session.scalar(select(func.count()).where(AuditEvent.link.is_(None))) or 0,
        )


def check_export(events: Iterable[Json], *, peppers: Sequence[bytes]) -> ChainCheck:
    """Verify exported events in their order. In a partial export, the first event's previous digest is trusted.

    The rows of retired keys precede the events, if there are any.
    """
    walk, number = _Walk(link=0, digest=GENESIS), 0
    rows: list[Json] = []
    keys: list[ChainKey] | None = None
    for event in events:
        if keys is None and event.get("object") == RetiredKey.WIRE_OBJECT:
            rows.append(event)
            continue
        keys = derived_keys.chain_keys(rows, peppers) if keys is None else keys
        fields = {name: value for name, value in event.items() if name != "digest"}
        link, previous = event.get("link"), event.get("previous")
        if number == 0 and isinstance(link, int) and link > 1:
            walk = _Walk(link=link - 1, digest=str(previous))
        fault = _fault(fields, event.get("digest"), walk, keys)
        if fault is not None:
            ident = None if fault == "missing" else event.get("id")
            walk = replace(walk, misfit=Misfit(link=walk.link + 1, id=ident, fault=fault))
            break
        walk, number = _Walk(link=walk.link + 1, digest=str(event["digest"])), number + 1
    return ChainCheck(
        num_events=number,
        last_link=walk.link,
        last_digest=walk.digest,
        has_more=False,
        misfit=walk.misfit,
        num_unsealed=0,
    )


def lines(db: Database) -> Iterator[Json]:
    """Yield the rows of retired keys, then every sealed event with its digest, in chain order. Reads in pages."""
    with db.read() as session:
        rows = derived_keys.wire_rows(session)
    yield from rows
    last = 0
    while True:
        with db.read() as session:
            page = _sealed(session, after=last, limit=SEALED_AT_ONCE)
        yield from ({**content(event), "digest": event.digest} for event in page)
        if len(page) < SEALED_AT_ONCE:
            return
        last = page[-1].link or 0


def _seal_some(session: Session, pepper: bytes) -> int:
    serialize(session, derived_keys.CHAIN)
    derived_keys.check_current(session, pepper)
    key = derived_keys.chain_key(pepper)
    end = session.get(AuditHead, 1, with_for_update=True, populate_existing=True)
    if end is None:
        end = AuditHead(id=1, link=0, digest=GENESIS)
        session.add(end)
    unsealed = select(AuditEvent).where(AuditEvent.link.is_(None)).order_by(AuditEvent.seq).limit(SEALED_AT_ONCE)
    events = list(session.scalars(unsealed))
    for event in events:
        end.link += 1
        event.link, event.previous = end.link, end.digest
        event.digest = end.digest = seal_of(content(event), key)
    return len(events)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Walk:
    """Progress of a verification: the last verified link and its digest."""

    link: int
    digest: str
    misfit: Misfit | None = None


def _walk(session: Session, keys: Sequence[ChainKey], *, after: int, limit: int) -> _Walk:
    digest_before = GENESIS if after == 0 else session.scalar(select(AuditEvent.digest).where(AuditEvent.link == after))
    if digest_before is None:
        return _Walk(link=after, digest=GENESIS, misfit=Misfit(link=after, id=None, fault="missing"))
    walk = _Walk(link=after, digest=digest_before)
    for event in _sealed(session, after=after, limit=limit):
        fault = _fault(content(event), event.digest, walk, keys)
        if fault is not None:
            ident = None if fault == "missing" else event.id
            return replace(walk, misfit=Misfit(link=walk.link + 1, id=ident, fault=fault))
        walk = _Walk(link=walk.link + 1, digest=event.digest or "")
    return walk


def _fault(fields: Json, digest: object, before: _Walk, keys: Sequence[ChainKey]) -> Fault | None:
    if fields.get("link") != before.link + 1:
        return "missing"
    try:
        is_whole = not keys or is_sealed(fields, digest, keys, at=(before.link + 1, str(digest)))
    except (ValueError, AttributeError, TypeError):  # not canonicalizable, so it was never sealed in this form
        is_whole = False
    if not is_whole:
        return "changed"
    return None if fields.get("previous") == before.digest else "misplaced"


def _against_head(session: Session, walk: _Walk, end: int, noted: str, *, is_whole: bool) -> Misfit | None:
    """Return the misfit if the chain does not end at the recorded head."""
    if walk.link < end:
        return None if is_whole else Misfit(link=walk.link + 1, id=None, fault="missing")
    if walk.link > end or walk.digest != noted:
        ident = session.scalar(select(AuditEvent.id).where(AuditEvent.link == walk.link))
        return Misfit(link=walk.link, id=ident, fault="misplaced")
    return None


def head(session: Session) -> tuple[int, str]:
    """Return the link and digest of the last sealed event; link 0 if no event is sealed."""
    row = session.execute(select(AuditHead.link, AuditHead.digest)).first()
    return (row.link, row.digest) if row is not None else (0, GENESIS)


def _sealed(session: Session, *, after: int, limit: int) -> list[AuditEvent]:
    beyond = select(AuditEvent).where(AuditEvent.link > after)
    return list(session.scalars(beyond.order_by(AuditEvent.link).limit(limit)))


def _without_nulls(fields: Mapping[str, Any]) -> Json:
    """Remove nulls from the event and from its actor. `details` stay unchanged."""
    kept = {name: value for name, value in fields.items() if value is not None}
    if "actor" in kept:
        kept["actor"] = {name: value for name, value in kept["actor"].items() if value is not None}
    return kept


def _within_json(value: Any) -> Any:
    """Convert values that RFC 8785 can't represent to text: large integers, NaN, infinities, unpaired surrogates.

    Every event can therefore be sealed, and blocks no later one.
    """
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
