"""Refuses bodies that are JSON to Python alone: NaN, numbers too large to be one, and a key that occurs twice.

Of two values for one key the framework takes the last; a proxy, or who reads the log, may take the first.
"""

from __future__ import annotations

import json
import math
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute

from catalog.errors import InvalidRequest


async def refuse_loose_json(request: Request) -> None:
    """A dependency of every route; the framework has read the body, if the route has one. Raises InvalidRequest."""
    route = request.scope.get("route")
    if not isinstance(route, APIRoute) or route.body_field is None:
        return
    if request.headers.get("content-type", "").partition(";")[0].strip().lower().endswith("json"):
        body = await request.body()
        if body:
            json.loads(body, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()  # a body has a hundred thousand names: to count each would take minutes
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))[:80]
        raise InvalidRequest(
            f"The field {twice!a} occurs twice in one object.",
            code="duplicate_field",
            remedy="Keep one of them.",
            param=twice,
        )
    return found


def _constant(name: str) -> float:
    raise InvalidRequest(
        f"The body holds {name}, which is no JSON number.",
        code="number_not_finite",
        remedy="Leave the value out, or give a number.",
    )


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InvalidRequest(
            f"The body holds the number {text[:40]}, which is too large to be finite.",
            code="number_not_finite",
            remedy="Give a number below 1e308.",
        )
    return value
