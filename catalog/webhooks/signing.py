"""Secrets of endpoints, which are made and not stored: of a random salt in the row, and of the service's pepper.

So a stolen database signs nothing, and a message can be signed at any time. Signatures are the library's.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from standardwebhooks import Webhook

from catalog.errors import Conflict
from catalog.pepper import Pepper
from catalog.tables.webhooks import WebhookDelivery, WebhookEndpoint

PURPOSE = b"lorry: secrets of webhooks"
SECRET_BYTES = 24
"""A multiple of three: its base64 has no padding."""
ENDING_CHARACTERS = 4


class SecretLost(Conflict):
    """The secret that the endpoint's owner has can't be made any more."""

    def __init__(self) -> None:
        super().__init__(
            "The secret of the webhook endpoint can't be made any more: the service's pepper is another.",
            code="webhook_secret_lost",
            remedy="Make a new one: lorry webhooks rotate ID.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Secret:
    """What a row needs to know of it, and the secret itself."""

    salt: str
    ending: str
    text: str


def new(pepper: Pepper) -> Secret:
    salt = secrets.token_hex(24)
    text = _text(pepper.current, salt)
    return Secret(salt=salt, ending=text[-ENDING_CHARACTERS:], text=text)


def current(endpoint: WebhookEndpoint, pepper: Pepper) -> str:
    """Raises SecretLost."""
    return _recreated(pepper, endpoint.salt, endpoint.ending)


def good(endpoint: WebhookEndpoint, pepper: Pepper, *, now: float) -> list[str]:
    """The secrets that messages are signed with now: the new one first. Raises SecretLost."""
    found = [current(endpoint, pepper)]
    if endpoint.previous_salt and endpoint.previous_until is not None and endpoint.previous_until > now:
        found.append(_recreated(pepper, endpoint.previous_salt, endpoint.previous_ending or ""))
    return found


def body_of(delivery: WebhookDelivery) -> bytes:
    """OpenAI's event; the same bytes at every try."""
    event = {
        "object": "event",
        "id": delivery.event_id,
        "type": delivery.event_type,
        "created_at": int(delivery.event_at),
        "data": delivery.data,
    }
    return json.dumps(event, separators=(",", ":")).encode()


def headers(body: bytes, *, message_id: str, at: float, signed_with: Sequence[str]) -> dict[str, str]:
    """Standard Webhooks'. `at`: seconds since 1970, which receivers compare with their clock."""
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


def _recreated(pepper: Pepper, salt: str, ending: str) -> str:
    """By the pepper that gives the ending: in a rotation, the previous one for secrets that were made before it."""
    for key in pepper.all():
        text = _text(key, salt)
        if text[-ENDING_CHARACTERS:] == ending:
            return text
    raise SecretLost
