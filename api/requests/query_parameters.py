"""Parses query parameters that FastAPI does not: the metadata filter and unknown parameters.

Unknown parameters are rejected. If `?status=failed` were ignored, for example, the response would contain all jobs.
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
"""Operations that accept `metadata` and `metadata[KEY]` with any key."""
METADATA = re.compile(r"metadata(\[.+\])?")


async def refuse_unknown_query(request: Request) -> None:
    """Dependency of every route in the OpenAPI document. Raises InvalidRequest."""
    route = request.scope.get("route")
    if not request.query_params or not isinstance(route, APIRoute) or not route.include_in_schema:
        return
    known = query_parameters(route.dependant)
    has_metadata = route.operation_id in FILTERED_BY_METADATA
    for name in request.query_params:
        if name not in known and not (has_metadata and METADATA.fullmatch(name)):
            raise _unknown(name, known | {"metadata[KEY]"} if has_metadata else known)


def metadata_filter(query: QueryParams) -> dict[str, str] | None:
    """Return the pairs of `metadata[KEY]=VALUE`; {} for `metadata=null`; None without a filter.

    Raises InvalidRequest.
    """
    pairs = {key[9:-1]: value for key, value in query.items() if key.startswith("metadata[") and key.endswith("]")}
    plain = query.get("metadata")
    if plain is None:
        return pairs or None
    if plain != "null":
        raise InvalidRequest("metadata_filter_not_null", plain=plain[:80], param="metadata")
    for key in pairs:
        raise InvalidRequest("metadata_filters_conflict", key=f"metadata[{key[:80]}]", param="metadata")
    return {}


def query_parameters(dependant: Dependant) -> set[str]:
    """Return the names of the query parameters of a route and its dependencies."""
    own = {field.alias for field in dependant.query_params}
    return own.union(*(query_parameters(each) for each in dependant.dependencies))


def _unknown(name: str, known: set[str]) -> InvalidRequest:
    similar = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if similar:
        return InvalidRequest("unknown_query_parameter_like", name=name[:80], similar=similar[0], param=name[:80])
    return InvalidRequest(
        "unknown_query_parameter",
        name=name[:80],
        known=", ".join(map(repr, sorted(known))) or "no query parameters",
        param=name[:80],
    )
