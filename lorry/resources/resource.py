"""The requests that the resources of the API have in common: one object, a list with or without pages, and waiting.

A path is given in parts. The first one may have slashes; the others are quoted.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import quote

from lorry.errors import WaitTimeout
from lorry.transport.http import Params, Transport
from lorry.view import View

PAGE_SIZE = 100
Object = TypeVar("Object", bound=View)


class Resource:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def _get(self, view: type[Object], *path: str) -> Object:
        return view.of(self._transport.get(url(*path)))

    def _post(self, view: type[Object], *path: str, body: Any = None, key: str | None = None) -> Object:
        """key: the idempotency key. With one, a retry after a lost response creates no second object."""
        headers = None if key is None else {"idempotency-key": key}
        return view.of(self._transport.request("POST", url(*path), body=body, headers=headers))

    def _delete(self, *path: str) -> None:
        self._transport.request("DELETE", url(*path))

    def _list(
        self,
        view: type[Object],
        *path: str,
        limit: int | None = None,
        params: Params | None = None,
        page_size: int = PAGE_SIZE,
    ) -> Iterator[Object]:
        """Yield the objects of a list. Each page is requested when it is needed."""
        return itertools.islice(self._pages(view, url(*path), params or {}, page_size), limit)

    def _pages(self, view: type[Object], path: str, params: Params, page_size: int) -> Iterator[Object]:
        after: str | None = None
        while True:
            page = self._transport.get(path, {**params, "limit": page_size, "after": after})
            data: list[dict[str, Any]] = page.get("data") or []
            yield from map(view.of, data)
            if not data or not page.get("has_more"):
                return
            after = str(data[-1].get("id"))

    def _items(self, view: type[Object], *path: str) -> Iterator[Object]:
        """Yield the objects of a list without pages."""
        yield from map(view.of, self._transport.get(url(*path)).get("data") or [])

    def _poll(
        self,
        get: Callable[[], Object],
        is_done: Callable[[Object], bool],
        *,
        on_progress: Callable[[Object], None] | None = None,
        timeout_seconds: float | None,
        poll_seconds: float,
        timeout: Callable[[Object], WaitTimeout],
    ) -> Object:
        """Request the object every `poll_seconds` until it is done, and return it.

        `on_progress` gets each response. `timeout` returns the error to raise if the object is not done after
        `timeout_seconds`.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            found = get()
            if on_progress is not None:
                on_progress(found)
            if is_done(found):
                return found
            if deadline is not None and time.monotonic() >= deadline:
                raise timeout(found)
            self._transport.sleep(poll_seconds)


def url(first: str, *rest: str) -> str:
    return "/".join((first, *(quote(part, safe="") for part in rest)))


def given(**fields: Any) -> dict[str, Any]:
    """Return the fields of a request that are set."""
    return {name: value for name, value in fields.items() if value is not None}


def new_key() -> str:
    """Return an idempotency key."""
    return str(uuid.uuid4())
