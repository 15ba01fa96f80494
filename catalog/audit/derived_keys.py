"""Keys derived from the current pepper and from replaced ones, so that old seals and signatures stay verifiable.

A row of `retired_keys` holds the audit chain's key and the public lineage key of one replaced pepper, and the end of
the chain at the time of replacement. The row is encrypted under the current pepper (catalog/pepper.py): access to the
database alone is not enough to read or add a key. A retired chain key is accepted only up to that end, so its holder
can't forge later events. Forged earlier events would lead to a different end.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from catalog.audit import lineage_signatures
from catalog.db.database import Database, read_clock, serialize
from catalog.errors import Conflict
from catalog.pepper import Pepper, seal, unseal
from catalog.tables.table import Json
from catalog.tables.tenancy import AuditHead, RetiredKey

CHAIN = "audit chain"
"""Name of the lock that every writer of the chain takes."""
CHAIN_PURPOSE = b"lorry: audit chain"
"""Separates this key from other keys that are derived from the pepper."""
ID_PURPOSE = b"lorry: id of an audit chain key"
ROW_PURPOSE = b"lorry: retired keys"
log = logging.getLogger("lorry.catalog")


class PepperReplaced(Conflict):
    """This process still uses a replaced pepper."""

    def __init__(self) -> None:
        super().__init__("pepper_replaced")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainKey:
    """A key of the audit chain.

    For a retired key, `last_link` and `last_digest` are the end of the chain at the time of replacement; `last_link` is
    0 if the chain was empty.
    """

    key: bytes = field(repr=False)
    last_link: int | None = None
    last_digest: str = ""

    def covers(self, link: int, digest: str) -> bool:
        """Return whether the event with this link and digest may have been sealed with this key."""
        if self.last_link is None or link < self.last_link:
            return True
        return link == self.last_link and digest == self.last_digest


@dataclass(frozen=True, kw_only=True, slots=True)
class Retired:
    """The keys of one replaced pepper."""

    chain_key: ChainKey
    public_key: Json
    """A JSON Web Key; see lineage_signatures."""
    retired_at: float


def chain_key(pepper: bytes) -> bytes:
    return hmac.digest(pepper, CHAIN_PURPOSE, hashlib.sha256)


def retire(db: Database, pepper: Pepper) -> bool:
    """Store the keys of the previous pepper, and re-encrypt the keys of older peppers under the current one.

    Call it when an API server starts. Returns whether anything was written. Once the previous pepper's row exists, rows
    that are encrypted under the previous pepper are no longer accepted: its holder may have forged them.
    """
    if pepper.previous is None or pepper.previous == pepper.current:
        return False
    with db.write() as session:
        serialize(session, CHAIN)
        head = session.get(AuditHead, 1)
        ended = (head.link, head.digest) if head is not None else (0, "")
        rows = {row.id: row for row in session.scalars(select(RetiredKey).with_for_update())}
        previous_id = _key_id(pepper.previous)
        if previous_id in rows and _opened(rows[previous_id].id, rows[previous_id].sealed, pepper.current):
            return False
        for row in rows.values():
            if row.id == _key_id(pepper.current):  # the operator returned to this pepper
                session.delete(row)
                continue
            found = _opened(row.id, row.sealed, pepper.previous)
            if found is not None and (found.chain_key.last_link or 0) <= ended[0]:
                row.sealed = _sealed(row.id, found, pepper.current)
            elif row.id != previous_id:  # unreadable, or it covers events that do not exist yet: no server wrote it
                log.warning("retired key not kept id=%s", row.id)
        key = ChainKey(key=chain_key(pepper.previous), last_link=ended[0], last_digest=ended[1])
        public_key = lineage_signatures.public_key(pepper.previous)
        retired = Retired(chain_key=key, public_key=public_key, retired_at=read_clock(session))
        session.merge(RetiredKey(id=previous_id, sealed=_sealed(previous_id, retired, pepper.current)))
    return True


def check_current(session: Session, pepper: bytes) -> None:
    """Raises PepperReplaced if another server has retired this pepper's keys: new seals with them are invalid."""
    if session.get(RetiredKey, _key_id(pepper)) is not None:
        raise PepperReplaced


def wire_rows(session: Session) -> list[Json]:
    """Return the rows in the format of an audit log export. Only a holder of the pepper can decrypt them."""
    rows = session.scalars(select(RetiredKey).order_by(RetiredKey.id))
    return [{"object": RetiredKey.WIRE_OBJECT, "id": row.id, "sealed": row.sealed} for row in rows]


def chain_keys(rows: Iterable[Mapping[str, Any]], peppers: Sequence[bytes]) -> list[ChainKey]:
    """Return the keys that may have sealed the audit chain, the current one first. Empty if no pepper is known.

    rows: the result of `wire_rows`. peppers: the current one first. The key of a previous pepper that no server has
    retired yet is valid for every link.
    """
    retired, unretired = _known(rows, peppers)
    keys = [ChainKey(key=chain_key(pepper)) for pepper in (*peppers[:1], *unretired)]
    return [*keys, *(each.chain_key for each in retired)]


def key_set(db: Database, peppers: Sequence[bytes]) -> Json:
    """Return the public keys of lineage signatures as a JSON Web Key Set: the current one, then previous ones.

    Retired keys have `retired_at` and are sorted from newest to oldest.
    """
    with db.read() as session:
        retired, unretired = _known(wire_rows(session), peppers)
    retired.sort(key=lambda each: each.retired_at, reverse=True)
    current = [lineage_signatures.public_key(pepper) for pepper in (*peppers[:1], *unretired)]
    return {"keys": [*current, *({**each.public_key, "retired_at": each.retired_at} for each in retired)]}


def _known(rows: Iterable[Mapping[str, Any]], peppers: Sequence[bytes]) -> tuple[list[Retired], list[bytes]]:
    """Return the retired keys that the peppers decrypt, and the previous peppers that are not retired yet."""
    sealed = {str(row.get("id")): str(row.get("sealed")) for row in rows}
    if not peppers:
        return [], []
    found = _all_opened(sealed, peppers[0])
    unretired = [pepper for pepper in peppers[1:] if _key_id(pepper) not in found]
    for pepper in unretired:
        found = {**_all_opened(sealed, pepper), **found}
    found.pop(_key_id(peppers[0]), None)
    return list(found.values()), unretired


def _all_opened(sealed: Mapping[str, str], pepper: bytes) -> dict[str, Retired]:
    opened = {ident: _opened(ident, text, pepper) for ident, text in sealed.items()}
    return {ident: retired for ident, retired in opened.items() if retired is not None}


def _key_id(pepper: bytes) -> str:
    """Return an id for the keys of a pepper. The keys can't be computed from it."""
    return hmac.new(chain_key(pepper), ID_PURPOSE, hashlib.sha256).hexdigest()[:32]


def _sealed(ident: str, retired: Retired, pepper: bytes) -> str:
    """Encrypt the keys for a row."""
    content = {
        "key": retired.chain_key.key.hex(),
        "link": retired.chain_key.last_link,
        "digest": retired.chain_key.last_digest,
        "public_key": retired.public_key,
        "retired_at": retired.retired_at,
    }
    return seal(json.dumps(content), purpose=ROW_PURPOSE, row_id=ident, pepper=pepper)


def _opened(ident: str, sealed: str, pepper: bytes) -> Retired | None:
    """Decrypt a row; None if it was not encrypted under this pepper."""
    opened = unseal(sealed, purpose=ROW_PURPOSE, row_id=ident, peppers=[pepper])
    if opened is None:
        return None
    try:  # the content is untrusted: a holder of a replaced pepper may have written it
        record: Any = json.loads(opened)
        key = ChainKey(
            key=bytes.fromhex(record["key"]), last_link=int(record["link"]), last_digest=str(record["digest"])
        )
        return Retired(chain_key=key, public_key=dict(record["public_key"]), retired_at=float(record["retired_at"]))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
        return None
