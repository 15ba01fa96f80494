"""Secrets of endpoints, signatures of messages, and the encryption of stored webhook URLs.

The salt of a secret is random and stored in the endpoint's row. A stolen database therefore can't sign messages, and
the service can recreate a secret at any time. The library standardwebhooks computes the signatures. The path of a
webhook URL is often a secret. So `url` of a row shows only host and last characters, and `sealed_url` is encrypted.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import urlsplit

from sqlalchemy import select
from standardwebhooks import Webhook

from catalog.db.database import Database
from catalog.errors import Conflict
from catalog.pepper import Pepper, resealed, seal, unseal
from catalog.tables.webhooks import WebhookDelivery, WebhookEndpoint

PURPOSE = b"lorry: secrets of webhooks"
SECRET_BYTES = 24
"""A multiple of three: its base64 has no padding."""
ENDING_CHARACTERS = 4
URL_PURPOSE = b"lorry: urls of webhooks"
SHORTEST_PATH = 12
"""No character of a shorter path is shown."""
log = logging.getLogger("lorry.catalog")


class SecretLost(Conflict):
    """The secret that the endpoint's owner has can't be recreated any more."""

    def __init__(self, endpoint_id: str) -> None:
        super().__init__("webhook_secret_lost", endpoint_id=endpoint_id)


@dataclass(frozen=True, kw_only=True, slots=True)
class Secret:
    """A secret, with the salt and last characters that an endpoint's row stores."""

    salt: str
    ending: str
    text: str


def new(pepper: Pepper) -> Secret:
    salt = secrets.token_hex(24)
    text = _text(pepper.current, salt)
    return Secret(salt=salt, ending=text[-ENDING_CHARACTERS:], text=text)


def current(endpoint: WebhookEndpoint, pepper: Pepper) -> str:
    """Return the endpoint's current secret. Raises SecretLost."""
    return _recreated(pepper, endpoint.salt, endpoint.ending, endpoint_id=endpoint.id)


def good(endpoint: WebhookEndpoint, pepper: Pepper, *, now: float) -> list[str]:
    """Return the valid secrets, with which messages are signed: the newest first. Raises SecretLost."""
    found = [current(endpoint, pepper)]
    if endpoint.previous_salt and endpoint.previous_until is not None and endpoint.previous_until > now:
        found.append(
            _recreated(pepper, endpoint.previous_salt, endpoint.previous_ending or "", endpoint_id=endpoint.id)
        )
    return found


def body_of(delivery: WebhookDelivery) -> bytes:
    """Return the event in OpenAI's format. Every attempt sends the same bytes."""
    event = {
        "object": "event",
        "id": delivery.event_id,
        "type": delivery.event_type,
        "created_at": int(delivery.event_at),
        "data": delivery.data,
    }
    return json.dumps(event, separators=(",", ":")).encode()


def headers(body: bytes, *, message_id: str, at: float, signed_with: Sequence[str]) -> dict[str, str]:
    """Return the headers of Standard Webhooks. at: seconds since 1970, which receivers compare with their clock."""
    moment = datetime.fromtimestamp(int(at), UTC)
    signatures = [Webhook(secret).sign(message_id, moment, body.decode()) for secret in signed_with]
    return {
        "content-type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": str(int(at)),
        "webhook-signature": " ".join(signatures),
    }


def _text(pepper: bytes, salt: str) -> str:
    key = hmac.digest(pepper, PURPOSE, hashlib.sha256)
    return f"whsec_{base64.b64encode(hmac.digest(key, salt.encode(), hashlib.sha256)[:SECRET_BYTES]).decode()}"


def _recreated(pepper: Pepper, salt: str, ending: str, *, endpoint_id: str) -> str:
    """Return the secret, derived with the pepper that results in the stored ending. Raises SecretLost.

    During a rotation of the pepper, that is the previous one for secrets created before the rotation.
    """
    for key in pepper.all():
        text = _text(key, salt)
        if text[-ENDING_CHARACTERS:] == ending:
            return text
    raise SecretLost(endpoint_id)


class UrlLost(Conflict):
    """The endpoint's URL can't be decrypted."""

    def __init__(self, endpoint_id: str) -> None:
        super().__init__("webhook_url_lost", endpoint_id=endpoint_id)


def put(endpoint: WebhookEndpoint, url: str, *, peppers: Sequence[bytes]) -> None:
    """Set the URL of a row, whose id must be set. peppers: the current one first."""
    endpoint.sealed_url = seal(url, purpose=URL_PURPOSE, row_id=endpoint.id, pepper=peppers[0])
    endpoint.url = shown(url)


def get(endpoint: WebhookEndpoint, *, peppers: Sequence[bytes]) -> str:
    """Return the decrypted URL. Raises UrlLost."""
    url = unseal(endpoint.sealed_url, purpose=URL_PURPOSE, row_id=endpoint.id, peppers=peppers)
    if url is None:
        raise UrlLost(endpoint.id)
    return url


def shown(url: str) -> str:
    """Return the scheme, host and port, and for a path that is long enough its last four characters."""
    parts = urlsplit(url)
    path = url.removeprefix(f"{parts.scheme}://{parts.netloc}")
    ending = path[-ENDING_CHARACTERS:] if len(path) >= SHORTEST_PATH else ""
    return f"{parts.scheme}://{parts.netloc}/…{ending}"


def seal_all(db: Database, *, peppers: Sequence[bytes]) -> int:
    """Encrypt with the current pepper all URLs that are encrypted with the previous one. Returns how many."""
    with db.read() as session:
        rows = session.scalars(select(WebhookEndpoint).order_by(WebhookEndpoint.id))
        due = [row.id for row in rows if _resealed(row, peppers) != row.sealed_url]
    return sum(_seal_again(db, endpoint_id, peppers) for endpoint_id in due)


def _seal_again(db: Database, endpoint_id: str, peppers: Sequence[bytes]) -> bool:
    with db.write() as session:
        row = session.get(WebhookEndpoint, endpoint_id, with_for_update=True)
        if row is None:
            return False
        sealed = _resealed(row, peppers)
        if sealed == row.sealed_url:
            return False
        if sealed is None:
            log.warning("webhook url lost endpoint=%s", endpoint_id)
            return False
        row.sealed_url = sealed
    return True


def _resealed(row: WebhookEndpoint, peppers: Sequence[bytes]) -> str | None:
    """Return the URL encrypted with the current pepper, or None if it can't be decrypted."""
    return resealed(row.sealed_url, purpose=URL_PURPOSE, row_id=row.id, peppers=peppers)
