"""Path parameters of the routes, each with its description, and query parameters that FastAPI does not parse.

Unknown query parameters are rejected. If `?status=failed` were ignored, for example, the response would contain all
jobs.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated

from fastapi import Path, Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from starlette.datastructures import QueryParams

from catalog.errors import InvalidRequest

FileId = Annotated[str, Path(description="ID of the file, `file-…`.")]
UploadId = Annotated[str, Path(description="ID of the upload, `upload-…`.")]
PlanId = Annotated[str, Path(description="ID of the plan, `plan-…`.")]
JobId = Annotated[str, Path(description="ID of the job, `ftjob-…`.")]
SweepId = Annotated[str, Path(description="ID of the sweep, `sweep-…`.")]
BatchId = Annotated[str, Path(description="ID of the batch, `batch-…`.")]
WorkerId = Annotated[str, Path(description="ID of the worker process.")]
ApiKeyId = Annotated[str, Path(description="ID of the API key, `key-…`.")]
PermissionId = Annotated[str, Path(description="ID of the permission, `cp-…`.")]
ExportId = Annotated[str, Path(description="ID of the export, `export-…`.")]
WebhookEndpointId = Annotated[str, Path(description="ID of the endpoint, `webhook-…`.")]
WebhookDeliveryId = Annotated[str, Path(description="ID of the delivery, `delivery-…`.")]
Model = Annotated[str, Path(description="Name of a base model, an adapter or a checkpoint.")]
Adapter = Annotated[
    str, Path(description="ID or name of an adapter or checkpoint, or ID of a finished sweep for its best adapter.")
]
FineTunedModel = Annotated[str, Path(description="ID or name of an adapter or checkpoint.")]
Organization = Annotated[str, Path(description="ID or name of the organization.")]
Project = Annotated[str, Path(description="ID or name of the project.")]
ServingEndpoint = Annotated[str, Path(description="ID or name of the serving endpoint.")]
FilePath = Annotated[str, Path(description="Path of the file, from the list of files.")]
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
