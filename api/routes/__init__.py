"""One file per resource: parse, one call to the catalog, shape."""

from __future__ import annotations

from typing import Any

from api.schemas.errors import ErrorResponse

_MEANINGS = {
    400: "The request says something that can't be done.",
    401: "No valid API key or browser session.",
    403: "The key may not do this.",
    404: "No such thing, or it is another project's.",
    409: "Not in the state that it is in.",
    413: "Too large.",
    429: "Too much at once; see Retry-After.",
    503: "The database or the store does not answer; see Retry-After.",
    507: "The disk is full; nothing was kept.",
}

Responses = dict[int | str, dict[str, Any]]


def errors(*statuses: int) -> Responses:
    """The refusals of a route, for the OpenAPI document."""
    return {status: {"model": ErrorResponse, "description": _MEANINGS[status]} for status in statuses}


def binary(media_type: str, description: str) -> Responses:
    """A successful answer that is no JSON, for the OpenAPI document."""
    schema = {"type": "string", "format": "binary"}
    return {200: {"content": {media_type: {"schema": schema}}, "description": description}}


SIGNED: Responses = errors(400, 401, 403, 429, 503)
"""What every route behind a key may answer."""
