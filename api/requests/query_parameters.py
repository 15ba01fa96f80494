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
        raise InvalidRequest(
            f"The query parameter 'metadata' is {plain[:80]!a}, but must be null.",
            code="invalid_value",
            remedy="To filter by metadata, use metadata[KEY]=VALUE. To find jobs without metadata, use metadata=null.",
            param="metadata",
        )
    for key in pairs:
        raise InvalidRequest(
            f"The query parameter metadata=null can't be combined with {f'metadata[{key[:80]}]'!a}.",
            code="invalid_value",
            remedy="Remove metadata=null to filter by metadata, or metadata[KEY] to find jobs without metadata.",
            param="metadata",
        )
    return {}


def query_parameters(dependant: Dependant) -> set[str]:
    """Return the names of the query parameters of a route and its dependencies."""
    own = {field.alias for field in dependant.query_params}
    return own.union(*(query_parameters(each) for each in dependant.dependencies))


def _unknown(name: str, known: set[str]) -> InvalidRequest:
    similar = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    listed = f"Remove it. This operation accepts {', '.join(map(repr, sorted(known))) or 'no query parameters'}."
    return InvalidRequest(
        f"Unknown query parameter {name[:80]!a}.",
        code="unknown_parameter",
        remedy=f"Did you mean {similar[0]!r}?" if similar else listed,
        param=name[:80],
    )
