"""Lists of the API, followed from page to page by the `after` cursor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lorry.transport.http import Params, Transport

PAGE_SIZE = 100


def follow(
    transport: Transport, path: str, *, params: Params | None = None, page_size: int = PAGE_SIZE
) -> Iterator[dict[str, Any]]:
    """Every object of a list, asked for page by page as the caller goes on."""
    after: str | None = None
    while True:
        page = transport.get(path, {**(params or {}), "limit": page_size, "after": after})
        data: list[dict[str, Any]] = page.get("data") or []
        yield from data
        if not data or not page.get("has_more"):
            return
        after = str(data[-1].get("id"))


def whole(transport: Transport, path: str) -> Iterator[dict[str, Any]]:
    """Every item of a list that comes at once."""
    yield from transport.get(path).get("data") or []
