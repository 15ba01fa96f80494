"""Anchors of the audit chain: each day's head, in the artifact store, sealed like an event.

Who can write to the database but has no pepper can't forge a digest; he can delete the newest events and set back the
head. An anchor outside the database shows that: the chain must still have its event, with its digest. So what was
deleted more than a day after it was written is noticed.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select

from catalog.audit import chain, derived_keys
from catalog.audit.chain import ChainCheck, Misfit
from catalog.audit.derived_keys import ChainKey
from catalog.db.database import Database, read_clock
from catalog.storage.object_storage import NoSuchObject, Objects
from catalog.tables.audit import AuditEvent
from catalog.tables.table import Json

PREFIX = "audit/anchors"
SUPERSEDED_PREFIX = "audit/superseded"
"""Anchors that a restore has moved away, in a folder for each restore."""
MAX_BYTES = 4096
"""An anchor has some 250; a larger object is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchor:
    """Place and digest of the event that was the last of the chain when the anchor was written."""

    link: int
    digest: str
    anchored_at: float
    """Seconds since 1970 by the database's clock."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Superseded:
    """An anchor of events that a restore has lost: its object, and the place of its event."""

    key: str
    link: int


def anchor(db: Database, objects: Objects, *, pepper: bytes) -> bool:
    """Write the anchor of this day (UTC) where there is none and the chain has an event. Returns whether it did.

    Of several API servers that write at once the last one's stays: each of them is right. Raises Unavailable,
    PepperReplaced.
    """
    with db.read() as session:
        now = read_clock(session)
        link, digest = chain.head(session)
        derived_keys.check_current(session, pepper)  # after the head: a key covers what preceded its retirement
    key = _key(now)
    if link == 0 or _exists(objects, key):
        return False
    told: Json = {"object": "audit_anchor", "link": link, "digest": digest, "anchored_at": now}
    told["mac"] = chain.seal_of(told, derived_keys.chain_key(pepper))
    objects.put(key, json.dumps(told, separators=(",", ":")).encode())
    return True


def verify(
    db: Database,
    objects: Objects,
    *,
    peppers: Sequence[bytes],
    after: int = 0,
    limit: int = chain.CHECKED_AT_ONCE,
) -> ChainCheck:
    """As audit_chain.check, and the anchors of this part of the chain. At the end of the chain, these are all anchors
    behind `after`. Raises Unavailable."""
    found = chain.check(db, peppers=peppers, after=after, limit=limit)
    if found.misfit is not None:
        return found
    anchors = _Anchors(db, objects, peppers)
    try:
        misfit = anchors.first_misfit(after=after, last=found.last_link if found.has_more else None)
    except _ChangedAnchor as changed:
        misfit = Misfit(link=0, id=changed.key, fault="anchor_changed")
    return replace(found, misfit=misfit)


def contradicting(db: Database, objects: Objects, *, peppers: Sequence[bytes], since: float) -> list[Superseded]:
    """Anchors since that time (seconds since 1970) which don't fit the chain. Raises Unavailable.

    After a restore of a backup of that time they are expected: what they anchored came later and is lost. Anchors of
    before the backup, and those that were changed, are not among them: verification goes on to report these.
    """
    anchors, found = _Anchors(db, objects, peppers), list[Superseded]()
    for key in anchors.keys[bisect_left(anchors.keys, _key(since)) :]:
        try:
            anchor = anchors.read(key)
        except _ChangedAnchor:
            continue
        if anchor.anchored_at > since and anchors.misfit(anchor) is not None:
            found.append(Superseded(key=key, link=anchor.link))
    return found


def supersede(objects: Objects, anchors: Iterable[Superseded], *, at: float) -> None:
    """Move them to where verification does not look. Raises Unavailable."""
    folder = datetime.fromtimestamp(at, UTC).strftime("%Y%m%dT%H%M%SZ")
    for anchor in anchors:
        objects.move(anchor.key, f"{SUPERSEDED_PREFIX}/{folder}/{anchor.key.rpartition('/')[2]}")


class _ChangedAnchor(Exception):
    """No API server has written this object."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


class _Anchors:
    """The stored anchors, by day. Each is read once."""

    def __init__(self, db: Database, objects: Objects, peppers: Sequence[bytes]) -> None:
        self._db, self._objects = db, objects
        with db.read() as session:
            self._chain_keys = derived_keys.chain_keys(derived_keys.wire_rows(session), peppers)
        self.keys = sorted(entry.key for entry in objects.list_all(PREFIX))
        self._found: dict[str, Anchor] = {}

    def first_misfit(self, *, after: int, last: int | None) -> Misfit | None:
        """Of the anchors behind `after`, up to `last`. The chain only grows, so their places are in the order of their
        days: of the others, a binary search reads a few. Raises _ChangedAnchor."""
        first = bisect_right(self.keys, after, key=lambda key: self.read(key).link)
        for key in self.keys[first:]:
            anchor = self.read(key)
            if last is not None and anchor.link > last:
                return None
            if (misfit := self.misfit(anchor)) is not None:
                return misfit
        return None

    def misfit(self, anchor: Anchor) -> Misfit | None:
        with self._db.read() as session:
            event = select(AuditEvent.id, AuditEvent.digest).where(AuditEvent.link == anchor.link)
            row = session.execute(event).first()
        if row is None:
            return Misfit(link=anchor.link, id=None, fault="missing")
        return None if row.digest == anchor.digest else Misfit(link=anchor.link, id=row.id, fault="changed")

    def read(self, key: str) -> Anchor:
        """Raises _ChangedAnchor."""
        if key not in self._found:
            anchor = _read(self._objects, key, self._chain_keys)
            if anchor is None:
                raise _ChangedAnchor(key)
            self._found[key] = anchor
        return self._found[key]


def _read(objects: Objects, key: str, keys: Sequence[ChainKey]) -> Anchor | None:
    """None where it is not what an API server has written. Where no pepper is known it is taken at its word."""
    try:
        if objects.head(key).num_bytes > MAX_BYTES:
            return None
        told: Any = json.loads(b"".join(objects.read(key)))
        content = {name: value for name, value in told.items() if name != "mac"}
        if keys and not chain.is_sealed(content, told["mac"], keys, at=(told["link"], told["digest"])):
            return None
        if key != _key(told["anchored_at"]):  # a valid older one, put here under a newer name
            return None
        return Anchor(link=int(told["link"]), digest=str(told["digest"]), anchored_at=float(told["anchored_at"]))
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
