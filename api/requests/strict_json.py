"""Rejects bodies that only Python accepts as JSON: NaN, numbers beyond the range of a float, and duplicate keys.

For a duplicate key FastAPI uses the last value; a proxy or a log reader may use the first.
"""

from __future__ import annotations

import json
import math
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute

from catalog.errors import InvalidRequest


async def refuse_loose_json(request: Request) -> None:
    """Dependency of every route. FastAPI has already read the body, if the route has one. Raises InvalidRequest."""
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
        seen: set[str] = set()  # a body may have a hundred thousand names: counting each would take minutes
        duplicate = next(name for name, _ in pairs if name in seen or seen.add(name))[:80]
        raise InvalidRequest(
            f"The field {duplicate!a} appears more than once in the same JSON object.",
            code="duplicate_field",
            remedy="Send the field only once.",
            param=duplicate,
        )
    return found


def _constant(name: str) -> float:
    raise InvalidRequest(
        f"The request body contains {name}, which is not valid in JSON.",
        code="number_not_finite",
        remedy="Use a finite number, or remove the value.",
    )


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InvalidRequest(
            f"The request body contains the number {text[:40]}, which is not between -1.8e308 and 1.8e308.",
            code="number_not_finite",
            remedy="Use a number within this range.",
        )
    return value
