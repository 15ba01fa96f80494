"""Encryption of stored webhook URLs with the pepper, because the path of a webhook URL is often a secret.

A row's `url` shows the host and the last characters. `sealed_url` is the encrypted URL: AES-256-GCM, bound to the
endpoint's id, so that a copy in another row can't be decrypted. Older rows have the plain URL in `url` until `seal_all`
encrypts it.
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
"""No character of a shorter path is shown."""
log = logging.getLogger("lorry.catalog")


class UrlLost(Conflict):
    """The endpoint's URL can't be decrypted."""

    def __init__(self, endpoint_id: str) -> None:
        super().__init__(
            f"The URL of webhook endpoint {endpoint_id} can't be decrypted, because the service's pepper has changed.",
            code="webhook_url_lost",
            remedy=f"Set the URL again: `lorry webhooks update {endpoint_id} --url URL`.",
        )


def put(endpoint: WebhookEndpoint, url: str, *, peppers: Sequence[bytes]) -> None:
    """Set the URL of a row, whose id must be set. peppers: the current one first."""
    nonce = os.urandom(NONCE_BYTES)
    sealed = _cipher(peppers[0]).encrypt(nonce, url.encode(), endpoint.id.encode())
    endpoint.sealed_url = base64.b64encode(nonce + sealed).decode()
    endpoint.url = shown(url)


def get(endpoint: WebhookEndpoint, *, peppers: Sequence[bytes]) -> str:
    """Return the decrypted URL. Raises UrlLost."""
    if endpoint.sealed_url is None:
        return endpoint.url
    for pepper in peppers:
        if (url := _opened(endpoint, endpoint.sealed_url, pepper)) is not None:
            return url
    raise UrlLost(endpoint.id)


def shown(url: str) -> str:
    """Return the scheme, host and port, and for a path that is long enough its last four characters."""
    parts = urlsplit(url)
    path = url.removeprefix(f"{parts.scheme}://{parts.netloc}")
    ending = path[-ENDING_CHARACTERS:] if len(path) >= SHORTEST_PATH else ""
    return f"{parts.scheme}://{parts.netloc}/…{ending}"


def seal_all(db: Database, *, peppers: Sequence[bytes]) -> int:
    """Encrypt with the current pepper all URLs that are plain or encrypted with the previous one. Returns how many."""
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
