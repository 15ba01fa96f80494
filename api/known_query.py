"""Refuses query parameters that a route doesn't have: `?status=failed`, passed over, would answer with all jobs."""

from __future__ import annotations

import difflib
import re
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute

from catalog.errors import InvalidRequest

FILTERED_BY_LABELS = frozenset({"list_jobs"})
"""Operations that take `metadata` and `metadata[KEY]`, any key."""
LABEL = re.compile(r"metadata(\[.+\])?")


def refuse_unknown_query(request: Request) -> None:
    """A dependency of every route, which knows what the OpenAPI document says. Raises InvalidRequest."""
    route = request.scope.get("route")
    if not request.query_params or not isinstance(route, APIRoute) or not route.include_in_schema:
        return
    operation: dict[str, Any] = request.app.openapi()["paths"][route.path_format].get(request.method.lower(), {})
    known = {one["name"] for one in operation.get("parameters", ()) if one["in"] == "query"}
    has_labels = route.operation_id in FILTERED_BY_LABELS
    for name in request.query_params:
        if name not in known and not (has_labels and LABEL.fullmatch(name)):
            raise _unknown(name, known | {"metadata"} if has_labels else known)


def _unknown(name: str, known: set[str]) -> InvalidRequest:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    listed = f"Leave it out. Known here: {', '.join(sorted(known)) or 'none'}."
    remedy = f"Did you mean {near[0]!r}?" if near else listed
    return InvalidRequest(
        f"There is no query parameter {name[:80]!a} here.", code="unknown_parameter", remedy=remedy, param=name[:80]
    )
