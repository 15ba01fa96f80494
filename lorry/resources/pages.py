"""Pagination of the API's lists with the `after` cursor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lorry.transport.http import Params, Transport

PAGE_SIZE = 100


def follow(
    transport: Transport, path: str, *, params: Params | None = None, page_size: int = PAGE_SIZE
) -> Iterator[dict[str, Any]]:
    """Yield every object of a list. Each page is requested when it is needed."""
    after: str | None = None
    while True:
        page = transport.get(path, {**(params or {}), "limit": page_size, "after": after})
        data: list[dict[str, Any]] = page.get("data") or []
        yield from data
        if not data or not page.get("has_more"):
            return
        after = str(data[-1].get("id"))


def items(transport: Transport, path: str) -> Iterator[dict[str, Any]]:
    """Yield every item of a list without pages."""
    yield from transport.get(path).get("data") or []
