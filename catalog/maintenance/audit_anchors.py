"""Anchors of the audit chain: the head of the chain on each day, kept in the artifact store and sealed like an event.

An attacker who can write to the database but lacks the pepper can't forge a digest, but can delete the newest events
and set back the head. An anchor outside the database reveals that, because the chain must still contain its event with
its digest. A deletion more than a day after the event was written is therefore detected.
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
from catalog.tables.table import Json
from catalog.tables.tenancy import AuditEvent

PREFIX = "audit/anchors"
SUPERSEDED_PREFIX = "audit/superseded"
"""Anchors that restores have moved away, in one folder per restore."""
MAX_BYTES = 4096
"""A larger object is not an anchor: an anchor has about 250 bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchor:
    """Link number and digest of the event that was last in the chain when the anchor was written."""

    link: int
    digest: str
    anchored_at: float
    """Seconds since 1970 by the database's clock."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Superseded:
    """An anchor of events that a restore has lost: its object, and the link number of its event."""

    key: str
    link: int


def anchor(db: Database, objects: Objects, *, pepper: bytes) -> bool:
    """Write today's anchor (UTC) if it does not exist and the chain has an event. Returns whether it was written.

    If several API servers write at the same time, the last one wins; each of their anchors is correct. Raises
    Unavailable, PepperReplaced.
    """
    with db.read() as session:
        now = read_clock(session)
        link, digest = chain.head(session)
        # After the head is read, because a key is valid for events that precede its retirement.
        derived_keys.check_current(session, pepper)
    key = _key(now)
    if link == 0 or _exists(objects, key):
        return False
    record: Json = {"object": "audit_anchor", "link": link, "digest": digest, "anchored_at": now}
    record["mac"] = chain.seal_of(record, derived_keys.chain_key(pepper))
    objects.put(key, json.dumps(record, separators=(",", ":")).encode())
    return True


def verify(
    db: Database,
    objects: Objects,
    *,
    peppers: Sequence[bytes],
    after: int = 0,
    limit: int = chain.CHECKED_AT_ONCE,
) -> ChainCheck:
    """Check a part of the chain like `chain.check`, and the anchors of this part. Raises Unavailable.

    At the end of the chain, all anchors behind `after` are checked.
    """
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
    """Return the anchors written after `since` (seconds since 1970) that don't match the chain. Raises Unavailable.

    They are expected after a restore of a backup from that time, because their events came later and are lost. Anchors
    that are older than the backup and modified anchors are not included: verification continues to report them.
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
    """Move the anchors to a prefix that verification ignores. Raises Unavailable."""
    folder = datetime.fromtimestamp(at, UTC).strftime("%Y%m%dT%H%M%SZ")
    for anchor in anchors:
        objects.move(anchor.key, f"{SUPERSEDED_PREFIX}/{folder}/{anchor.key.rpartition('/')[2]}")


class _ChangedAnchor(Exception):
    """An anchor object that no API server has written."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


class _Anchors:
    """The stored anchors by day. Caches each anchor that is read."""

    def __init__(self, db: Database, objects: Objects, peppers: Sequence[bytes]) -> None:
        self._db, self._objects = db, objects
        with db.read() as session:
            self._chain_keys = derived_keys.chain_keys(derived_keys.wire_rows(session), peppers)
        self.keys = sorted(entry.key for entry in objects.list_all(PREFIX))
        self._found: dict[str, Anchor] = {}

    def first_misfit(self, *, after: int, last: int | None) -> Misfit | None:
        """Return the first anchor behind `after`, up to `last`, that does not match the chain. Raises _ChangedAnchor.

        The chain only grows, so the anchors' links are in the order of their days. A binary search for the first anchor
        reads only a few of those up to `after`.
        """
        first = bisect_right(self.keys, after, key=lambda key: self.read(key).link)
        for key in self.keys[first:]:
            anchor = self.read(key)
            if last is not None and anchor.link > last:
                return None
            if (misfit := self.misfit(anchor)) is not None:
                return misfit
        return None

    def misfit(self, anchor: Anchor) -> Misfit | None:
        """How the anchor's event in the chain differs from the anchor, or None."""
        with self._db.read() as session:
            event = select(AuditEvent.id, AuditEvent.digest).where(AuditEvent.link == anchor.link)
            row = session.execute(event).first()
        if row is None:
            return Misfit(link=anchor.link, id=None, fault="missing")
        return None if row.digest == anchor.digest else Misfit(link=anchor.link, id=row.id, fault="changed")

    def read(self, key: str) -> Anchor:
        """Return the anchor of this object. Raises _ChangedAnchor."""
        if key not in self._found:
            anchor = _read(self._objects, key, self._chain_keys)
            if anchor is None:
                raise _ChangedAnchor(key)
            self._found[key] = anchor
        return self._found[key]


def _read(objects: Objects, key: str, keys: Sequence[ChainKey]) -> Anchor | None:
    """Return the anchor, or None if no API server has written it. Without a known pepper, the seal is not checked."""
    try:
        if objects.head(key).num_bytes > MAX_BYTES:
            return None
        record: Any = json.loads(b"".join(objects.read(key)))
        content = {name: value for name, value in record.items() if name != "mac"}
        if keys and not chain.is_sealed(content, record["mac"], keys, at=(record["link"], record["digest"])):
            return None
        if key != _key(record["anchored_at"]):  # a valid older anchor, copied to a newer name
            return None
        return Anchor(link=int(record["link"]), digest=str(record["digest"]), anchored_at=float(record["anchored_at"]))
    except (NoSuchObject, ValueError, KeyError, AttributeError, TypeError, OverflowError, OSError):
        return None


def _key(anchored_at: float) -> str:
    """The object's key, which contains its day (UTC)."""
    return f"{PREFIX}/{datetime.fromtimestamp(anchored_at, UTC).date().isoformat()}.json"


def _exists(objects: Objects, key: str) -> bool:
    try:
        objects.head(key)
    except NoSuchObject:
        return False
    return True
