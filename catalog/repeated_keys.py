"""A request for a key that is sent again, for its reply was lost: it makes no second key, and tells the first one's.

Only an HMAC of a key's text is kept, so the lost reply can't be given again. While the key was never used, it gets a
new text, and the one that was lost opens nothing. One that was used has reached somebody: then that is said.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import rfc8785
from sqlalchemy import select
from sqlalchemy.orm import Session

from catalog import keys
from catalog.callers import Caller
from catalog.db import serialise
from catalog.errors import Conflict
from catalog.tables import ApiKey

CLIENT_RETRY_SECONDS = 600.0
"""The same again, marked by the client as a retry, is the same request for so long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """What tells one request for a key from another."""

    digest: str
    """Of what was asked for."""
    idempotency_key: str | None = None
    is_client_retry: bool = False


def digest(verb: str, fields: dict[str, Any]) -> str:
    return hashlib.sha256(rfc8785.dumps({"verb": verb, **fields})).hexdigest()


def made_before(
    session: Session, caller: Caller, sent: Sent, *, pepper: bytes, now: float
) -> tuple[ApiKey, str] | None:
    """The key that this request made before, with a new text. Until the transaction ends, nobody else asks for it.

    Raises Conflict where the key was used or has ended, or its Idempotency-Key was for something else.
    """
    if sent.idempotency_key is None and not sent.is_client_retry:
        return None
    serialise(session, f"keys by {caller.api_key_id}")
    mine = select(ApiKey).where(ApiKey.created_by == caller.api_key_id)
    if sent.idempotency_key is not None:
        mine = mine.where(ApiKey.idempotency_key == sent.idempotency_key)
    elif session.get_one(ApiKey, caller.api_key_id).replaced_by is not None:
        return None  # it may have leaked, and what it asked for can be guessed; an Idempotency-Key can't be
    else:
        mine = mine.where(ApiKey.request_digest == sent.digest, ApiKey.created_at > now - CLIENT_RETRY_SECONDS)
    key = session.scalar(mine.order_by(ApiKey.created_at.desc()).limit(1).with_for_update())
    if key is None:
        return None
    _check(key, sent, now=now)
    secret = keys.renew(key, pepper)
    keys.note(session, "api_key.updated", key, now=now, details={"text": "anew, since its request was repeated"})
    return key, secret


def remember(key: ApiKey, caller: Caller, sent: Sent | None) -> None:
    """By what a repetition is known. `sent` None: of a request that can't be repeated."""
    key.created_by = caller.api_key_id
    if sent is not None:
        key.idempotency_key, key.request_digest = sent.idempotency_key, sent.digest


def _check(key: ApiKey, sent: Sent, *, now: float) -> None:
    if key.request_digest != sent.digest:
        raise Conflict(
            f"The Idempotency-Key {sent.idempotency_key!r} was used for another request.",
            code="idempotency_key_reused",
            remedy=f"It made the key {key.id}. Use a new one for a new key.",
            param="Idempotency-Key",
        )
    if key.last_used_at is not None or not keys.is_live(key, now):
        what = "is in use already" if keys.is_live(key, now) else "was revoked or has expired"
        raise Conflict(
            f"This request made the key {key.id}, which {what}: its text is not told again.",
            code="key_told_already",
            remedy="Use the text that the first answer told; or make another key, and revoke this one.",
        )
