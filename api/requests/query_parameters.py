"""Query parameters that FastAPI does not parse: the filter by metadata, and those that a route does not have.

Unknown parameters are refused, because `?status=failed`, if it were ignored, would return all jobs.
"""

from __future__ import annotations

import difflib
import re

from fastapi import Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from starlette.datastructures import QueryParams

from catalog.errors import InvalidRequest

FILTERED_BY_METADATA = frozenset({"list_jobs"})
"""Operations that take `metadata` and `metadata[KEY]`, with any key."""
METADATA = re.compile(r"metadata(\[.+\])?")


async def refuse_unknown_query(request: Request) -> None:
    """A dependency of every route in the OpenAPI document. Raises InvalidRequest."""
    route = request.scope.get("route")
    if not request.query_params or not isinstance(route, APIRoute) or not route.include_in_schema:
        return
    known = query_parameters(route.dependant)
    has_metadata = route.operation_id in FILTERED_BY_METADATA
    for name in request.query_params:
        if name not in known and not (has_metadata and METADATA.fullmatch(name)):
            raise _unknown(name, known | {"metadata"} if has_metadata else known)


def metadata_filter(query: QueryParams) -> dict[str, str] | None:
    """Pairs of `metadata[KEY]=VALUE`; {} for `metadata=null`; None without a filter. Raises InvalidRequest."""
    pairs = {key[9:-1]: value for key, value in query.items() if key.startswith("metadata[") and key.endswith("]")}
    plain = query.get("metadata")
    if plain is None:
        return pairs or None
    if plain != "null" or pairs:
        raise InvalidRequest(
            "The filter by metadata can't be read.",
            code="invalid_value",
            remedy="Write metadata[KEY]=VALUE for each pair, or metadata=null alone.",
            param="metadata",
        )
    return {}


def query_parameters(dependant: Dependant) -> set[str]:
    """Names of the query parameters that a route and its dependencies take."""
    own = {field.alias for field in dependant.query_params}
    return own.union(*(query_parameters(each) for each in dependant.dependencies))


def _unknown(name: str, known: set[str]) -> InvalidRequest:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    listed = f"Leave it out. Known here: {', '.join(sorted(known)) or 'none'}."
    remedy = f"Did you mean {near[0]!r}?" if near else listed
    return InvalidRequest(
        f"There is no query parameter {name[:80]!a} here.", code="unknown_parameter", remedy=remedy, param=name[:80]
    )
