"""Routes, one file per resource: parse the request, make one call to the catalog, shape the response."""

from __future__ import annotations

from typing import Any

from api.schemas.errors import ErrorResponse

_MEANINGS = {
    400: "The request is invalid.",
    401: "The request contains no valid API key or browser session.",
    403: "The API key does not have the required rights.",
    404: "The object does not exist, or it belongs to another project.",
    409: "The state of the object does not allow this operation.",
    413: "The request body or the file is too large.",
    429: "A rate limit or a quota is exceeded; see Retry-After.",
    503: "The database or the store does not answer; see Retry-After.",
    507: "The disk is full. Nothing was stored.",
}

Responses = dict[int | str, dict[str, Any]]


def errors(*statuses: int) -> Responses:
    """Return the error responses of a route for the OpenAPI document."""
    return {status: {"model": ErrorResponse, "description": _MEANINGS[status]} for status in statuses}


def binary(media_type: str, description: str) -> Responses:
    """Return a successful non-JSON response for the OpenAPI document."""
    schema = {"type": "string", "format": "binary"}
    return {200: {"content": {media_type: {"schema": schema}}, "description": description}}


FILE: Responses = binary("application/octet-stream", "The file, as an attachment.")
SIGNED: Responses = errors(400, 401, 403, 429, 503)
"""Error responses of every route that requires a key."""
