"""Rejects bodies that only Python accepts as JSON: NaN, numbers beyond the range of a float, and duplicate keys. Bodies
that are nested too deeply are rejected too.

For a duplicate key FastAPI uses the last value; a proxy or a log reader may use the first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, cast

from fastapi import Request
from fastapi.routing import APIRoute

from catalog.datasets.row_json import MAX_NESTING, is_too_deep
from catalog.errors import InvalidRequest


class _Rejected:
    """Takes the place of a rejected value, so that its path is known once the body is parsed."""

    def __init__(self, error: Callable[[str], InvalidRequest]) -> None:
        self.error = error


async def refuse_loose_json(request: Request) -> None:
    """Dependency of every route. FastAPI has already read the body, if the route has one. Raises InvalidRequest."""
    route = request.scope.get("route")
    if not isinstance(route, APIRoute) or route.body_field is None:
        return
    if request.headers.get("content-type", "").partition(";")[0].strip().lower().endswith("json"):
        body = await request.body()
        if body:
            check(body)


def check(body: bytes) -> None:
    """Raises InvalidRequest for the first rejected value. Its path, such as 'seeds.0', is `param`."""
    rejected: list[_Rejected] = []

    def noted(error: Callable[[str], InvalidRequest]) -> _Rejected:
        rejected.append(_Rejected(error))
        return rejected[-1]

    def of_object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Rejected:
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        seen: set[str] = set()  # a body may have a hundred thousand names: counting each would take minutes
        duplicate = next(name for name, _ in pairs if name in seen or seen.add(name))
        return noted(lambda path: _repeated(f"{path}.{duplicate}" if path else duplicate))

    def of_float(text: str) -> float | _Rejected:
        value = float(text)
        return value if math.isfinite(value) else noted(lambda path: _out_of_range(path, text))

    try:
        parsed: Any = json.loads(
            body,
            object_pairs_hook=of_object,
            parse_constant=lambda name: noted(lambda path: _not_json(path, name)),
            parse_float=of_float,
        )
    except RecursionError as error:
        raise too_deep() from error
    if is_too_deep(parsed):
        raise too_deep()
    if rejected:
        raise _first(parsed)


_Place = tuple["_Place", str] | None
"""Place of a value in a body: that of its container, and its name in it. None: the whole body. The path is built for
one place only, because the paths of all values may be much larger than the body."""


def _first(parsed: Any) -> InvalidRequest:
    """Return the error of the first rejected value."""
    pending: list[tuple[_Place, Any]] = [(None, parsed)]
    while True:
        place, value = pending.pop()
        if isinstance(value, _Rejected):
            return value.error(_path(place))
        named: list[tuple[str, Any]] = []
        if isinstance(value, dict):
            named = [*cast("dict[str, Any]", value).items()]
        elif isinstance(value, list):
            named = [(str(number), each) for number, each in enumerate(cast("list[Any]", value))]
        pending += [((place, name), inner) for name, inner in reversed(named)]


def _path(place: _Place) -> str:
    names: list[str] = []
    while place is not None:
        place, name = place
        names.append(name)
    return ".".join(reversed(names))


def too_deep() -> InvalidRequest:
    """Return the error of a body that is nested too deeply. FastAPI can't even parse some of them."""
    return InvalidRequest("body_too_deep", max_nesting=MAX_NESTING)


def _repeated(path: str) -> InvalidRequest:
    return InvalidRequest("duplicate_field", path=path[:200], param=path[:200])


def _not_json(path: str, name: str) -> InvalidRequest:
    return InvalidRequest("parameter_not_json_number", path=_named(path), name=name, param=path[:200] or None)


def _out_of_range(path: str, text: str) -> InvalidRequest:
    shown = text if len(text) <= 40 else f"{text[:40]}…"
    return InvalidRequest("parameter_out_of_range", path=_named(path), shown=shown, param=path[:200] or None)


def _named(path: str) -> str:
    return f"{path[:200]!a}" if path else "The request body"
