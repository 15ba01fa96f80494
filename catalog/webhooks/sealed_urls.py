"""Encryption of stored webhook URLs with the pepper, because the path of a webhook URL is often a secret.

A row's `url` shows the host and the last characters. `sealed_url` is the encrypted URL; see catalog/sealing.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from urllib.parse import urlsplit

from sqlalchemy import select

from catalog import sealing
from catalog.db.database import Database
from catalog.errors import Conflict
from catalog.tables.webhooks import WebhookEndpoint

PURPOSE = b"lorry: urls of webhooks"
ENDING_CHARACTERS = 4
SHORTEST_PATH = 12
"""No character of a shorter path is shown."""
log = logging.getLogger("lorry.catalog")


class UrlLost(Conflict):
    """The endpoint's URL can't be decrypted."""

    def __init__(self, endpoint_id: str) -> None:
        super().__init__("webhook_url_lost", endpoint_id=endpoint_id)


def put(endpoint: WebhookEndpoint, url: str, *, peppers: Sequence[bytes]) -> None:
    """Set the URL of a row, whose id must be set. peppers: the current one first."""
    endpoint.sealed_url = sealing.seal(url, purpose=PURPOSE, row_id=endpoint.id, pepper=peppers[0])
    endpoint.url = shown(url)


def get(endpoint: WebhookEndpoint, *, peppers: Sequence[bytes]) -> str:
    """Return the decrypted URL. Raises UrlLost."""
    url = sealing.unseal(endpoint.sealed_url, purpose=PURPOSE, row_id=endpoint.id, peppers=peppers)
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
    return sealing.resealed(row.sealed_url, purpose=PURPOSE, row_id=row.id, peppers=peppers)
