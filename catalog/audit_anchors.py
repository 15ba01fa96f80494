"""Anchors of the audit chain: each day's head, in the artifact store, sealed like an event.

Who can write to the database but has no pepper can't forge a digest; he can delete the newest events and set back the
head. An anchor outside the database shows that: the chain must still have its event, with its digest. So what was
deleted more than a day after it was written is noticed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select

from catalog import audit_chain
from catalog.artifacts.objects import NoSuchObject, Objects
from catalog.audit_chain import Checked, Misfit
from catalog.db import Database, read_clock
from catalog.tables import AuditEvent, Json

PREFIX = "audit/anchors"
MAX_BYTES = 4096
"""An anchor has some 250; a larger object is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchor:
    """Place and digest of the event that was the last of the chain when the anchor was written."""

    link: int
    digest: str


def anchor(db: Database, objects: Objects, *, pepper: bytes) -> bool:
    """Write the anchor of this day (UTC) where there is none and the chain has an event. Returns whether it did.

    Of several API servers that write at once the last one's stays: each of them is right. Raises Unavailable.
    """
    with db.read() as session:
        now = read_clock(session)
        link, digest = audit_chain.head(session)
    key = _key(now)
    if link == 0 or _exists(objects, key):
        return False
    told: Json = {"object": "audit_anchor", "link": link, "digest": digest, "anchored_at": now}
    told["mac"] = audit_chain.seal_of(told, audit_chain.chain_key(pepper))
    objects.put(key, json.dumps(told, separators=(",", ":")).encode())
    return True


def verify(
    db: Database,
    objects: Objects,
    *,
    peppers: Sequence[bytes],
    after: int = 0,
    limit: int = audit_chain.CHECKED_AT_ONCE,
) -> Checked:
    """As audit_chain.check; once it has come to the end of the chain, the anchors too. Raises Unavailable."""
    found = audit_chain.check(db, peppers=peppers, after=after, limit=limit)
    if found.has_more or found.misfit is not None:
        return found
    return replace(found, misfit=_against_anchors(db, objects, peppers))


def _against_anchors(db: Database, objects: Objects, peppers: Sequence[bytes]) -> Misfit | None:
    """The earliest anchor that doesn't fit."""
    for entry in sorted(objects.list_all(PREFIX), key=lambda entry: entry.key):
        found = _read(objects, entry.key, peppers)
        if found is None:
            return Misfit(link=0, id=entry.key, fault="anchor_changed")
        with db.read() as session:
            event = select(AuditEvent.id, AuditEvent.digest).where(AuditEvent.link == found.link)
            row = session.execute(event).first()
        if row is None:
            return Misfit(link=found.link, id=None, fault="missing")
        if row.digest != found.digest:
            return Misfit(link=found.link, id=row.id, fault="changed")
    return None


def _read(objects: Objects, key: str, peppers: Sequence[bytes]) -> Anchor | None:
    """None where it is not what an API server has written. Where no pepper is known it is taken at its word."""
    try:
        if objects.head(key).num_bytes > MAX_BYTES:
            return None
        told: Any = json.loads(b"".join(objects.read(key)))
        content = {name: value for name, value in told.items() if name != "mac"}
        if peppers and not audit_chain.is_sealed(content, told["mac"], peppers):
            return None
        if key != _key(told["anchored_at"]):  # a valid older one, put here under a newer name
            return None
        return Anchor(link=int(told["link"]), digest=str(told["digest"]))
    except (NoSuchObject, ValueError, KeyError, AttributeError, TypeError, OverflowError, OSError):
        return None


def _key(anchored_at: float) -> str:
    """The object's name: its day (UTC)."""
    return f"{PREFIX}/{datetime.fromtimestamp(anchored_at, UTC).date().isoformat()}.json"


def _exists(objects: Objects, key: str) -> bool:
    try:
        objects.head(key)
    except NoSuchObject:
        return False
    return True
