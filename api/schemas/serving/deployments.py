"""Schemas of deployments of adapters on serving endpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas import AdapterId, AdapterName, CreatedAt, Deleted, ObjectId, UpdatedAt
from api.schemas.serving.endpoints import ENDPOINT_ID, VERIFIED, ProbeVerification
from catalog.serving.deployments import DeploymentView
from catalog.spec.strict import WITHOUT_NUL, Strict

DEPLOYMENT: dict[str, Any] = {
    "object": "adapter.deployment",
    "id": "deployment-7d0c2f51a9b84e63c1d2e3f4",
    "adapter_id": "adapter-0a1b2c3d4e5f60718293a4b5",
    "adapter": "ft:smollm2:default:support:1c0ffee0",
    "endpoint_id": ENDPOINT_ID,
    "endpoint": "vllm-1",
    "state": "ready",
    "last_error": None,
    "verification": {**VERIFIED, "tolerance": 0.2, "distance_to_base": 0.9, "distinguishes": True},
    "created_at": 1790000200,
    "updated_at": 1790000203,
}
DeploymentState = Literal["pending", "ready", "failed", "removing"]
EndpointName = Annotated[
    str, Field(min_length=1, max_length=64, description="Name or ID of an endpoint.", json_schema_extra=WITHOUT_NUL)
]


class DeploymentRequest(Strict):
    """The serving endpoint that loads the adapter."""

    model_config = ConfigDict(json_schema_extra={"example": {"endpoint": "vllm-1"}})
    endpoint: EndpointName


class DeploymentObject(BaseModel):
    """An adapter on a serving endpoint."""

    model_config = ConfigDict(json_schema_extra={"example": DEPLOYMENT})
    object: Literal["adapter.deployment"] = "adapter.deployment"
    id: ObjectId
    adapter_id: AdapterId
    adapter: AdapterName
    endpoint_id: str = Field(description="ID of the serving endpoint.")
    endpoint: str = Field(description="Name of the serving endpoint.")
    state: DeploymentState = Field(
        description="pending: being loaded. ready: verified, and answers requests. failed: see last_error; it is tried "
        "again. removing: being unloaded."
    )
    last_error: str | None = Field(
        description="Why it is not ready. Only operators see the server's own text, which may contain paths."
    )
    verification: ProbeVerification | None = Field(
        description="Comparison with the built-in engine's answer; null until it is verified."
    )
    created_at: CreatedAt
    updated_at: UpdatedAt


class DeploymentDeleted(BaseModel):
    """Confirmation that a deployment is removed."""

    id: ObjectId
    object: Literal["adapter.deployment"] = "adapter.deployment"
    deleted: Deleted = True


def deployment_object(view: DeploymentView, *, shows_server_text: bool) -> DeploymentObject:
    row = view.deployment
    return DeploymentObject.model_validate(
        {
            "id": row.id,
            "adapter_id": row.adapter_id,
            "adapter": view.adapter,
            "endpoint_id": row.endpoint_id,
            "endpoint": view.endpoint,
            "state": row.state,
            "last_error": (row.operator_error if shows_server_text else None) or row.last_error,
            "verification": row.verification,
            "created_at": int(row.created_at),
            "updated_at": int(row.updated_at),
        }
    )
