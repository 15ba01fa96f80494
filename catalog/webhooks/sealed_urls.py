"""Webhook URLs at rest: encrypted under the pepper, because the path of many is a secret.

A row's `url` shows the host and the last characters, `sealed_url` is the whole: AES-256-GCM, bound to the endpoint's
id, so that a copy in another row opens nothing. Rows of before have the whole in `url` until `seal_all`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import os
from collections.abc import Sequence
from urllib.parse import urlsplit

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import select

from catalog.db.database import Database
from catalog.errors import Conflict
from catalog.tables.webhooks import WebhookEndpoint

PURPOSE = b"lorry: urls of webhooks"
NONCE_BYTES = 12
ENDING_CHARACTERS = 4
SHORTEST_PATH = 12
"""Of a shorter path no character is shown."""
log = logging.getLogger("lorry.catalog")


class UrlLost(Conflict):
    """The endpoint's URL can't be decrypted."""

    def __init__(self) -> None:
        super().__init__(
            "The address of the webhook endpoint can't be decrypted: the service has another pepper now.",
            code="webhook_url_lost",
            remedy="Give the address again: lorry webhooks change ID --url URL.",
        )


def put(endpoint: WebhookEndpoint, url: str, *, peppers: Sequence[bytes]) -> None:
    """Set the URL of a row that has its id. peppers: the current one first."""
    nonce = os.urandom(NONCE_BYTES)
    sealed = _cipher(peppers[0]).encrypt(nonce, url.encode(), endpoint.id.encode())
    endpoint.sealed_url = base64.b64encode(nonce + sealed).decode()
    endpoint.url = shown(url)


def get(endpoint: WebhookEndpoint, *, peppers: Sequence[bytes]) -> str:
    """The whole URL. Raises UrlLost."""
    if endpoint.sealed_url is None:
        return endpoint.url
    for pepper in peppers:
        if (url := _opened(endpoint, endpoint.sealed_url, pepper)) is not None:
            return url
    raise UrlLost


def shown(url: str) -> str:
    """Scheme, host and port, and the last four characters of a path that is long enough to hide the rest."""
    parts = urlsplit(url)
    path = url.removeprefix(f"{parts.scheme}://{parts.netloc}")
    ending = path[-ENDING_CHARACTERS:] if len(path) >= SHORTEST_PATH else ""
    return f"{parts.scheme}://{parts.netloc}/…{ending}"


def seal_all(db: Database, *, peppers: Sequence[bytes]) -> int:
    """Encrypt under the current pepper what is in plain text or encrypted under the previous one. Returns how many."""
    with db.read() as session:
        rows = session.scalars(select(WebhookEndpoint).order_by(WebhookEndpoint.id))
        due = [row.id for row in rows if not _is_current(row, peppers[0])]
    return sum(_seal_again(db, endpoint_id, peppers) for endpoint_id in due)


def _seal_again(db: Database, endpoint_id: str, peppers: Sequence[bytes]) -> bool:
    with db.write() as session:
        row = session.get(WebhookEndpoint, endpoint_id, with_for_update=True)
        if row is None or _is_current(row, peppers[0]):
            return False
        try:
            put(row, get(row, peppers=peppers), peppers=peppers)
        except UrlLost:
            log.warning("webhook url lost endpoint=%s", endpoint_id)
            return False
    return True


def _is_current(row: WebhookEndpoint, pepper: bytes) -> bool:
    return row.sealed_url is not None and _opened(row, row.sealed_url, pepper) is not None


def _opened(endpoint: WebhookEndpoint, sealed: str, pepper: bytes) -> str | None:
    content = base64.b64decode(sealed)
    try:
        opened = _cipher(pepper).decrypt(content[:NONCE_BYTES], content[NONCE_BYTES:], endpoint.id.encode())
    except InvalidTag:
        return None
    return opened.decode()


def _cipher(pepper: bytes) -> AESGCM:
    return AESGCM(hmac.digest(pepper, PURPOSE, hashlib.sha256))
