"""Schemas of serving endpoints, and of deployments of adapters on them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas import AdapterId, AdapterName, BaseDigest, BaseName, CreatedAt, Deleted, ObjectId, UpdatedAt
from catalog.serving.deployments import DeploymentView
from catalog.serving.endpoints import (
    DEFAULT_MAX_RANK,
    MAX_FOLDER,
    MAX_KEY,
    MAX_REPORT,
    MAX_URL,
    EngineKind,
    NewEndpoint,
)
from catalog.serving.servability import VLLM_RANKS
from catalog.spec.model_fields import LABEL_PATTERN, WITHOUT_NUL, Strict
from catalog.tables.serving import ServingEndpoint

ENDPOINT_ID = "endpoint-3f2b8c9d0a1e4f5a6b7c8d9e"
VERIFIED: dict[str, Any] = {
    "passed": True,
    "max_diff": 0.004,
    "tolerance": 0.5,
    "num_compared": 16,
    "prompt_tokens": 38,
    "expected_prompt_tokens": 38,
}
ENDPOINT: dict[str, Any] = {
    "object": "serving_endpoint",
    "id": ENDPOINT_ID,
    "name": "vllm-1",
    "kind": "vllm",
    "base_model": "smollm2",
    "base_digest": "9f86d081884c7d65",
    "url": "http://127.0.0.1:8100",
    "adapter_folder": "/srv/adapters",
    "has_api_key": False,
    "max_rank": 16,
    "state": "ready",
    "last_error": None,
    "served_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "verification": VERIFIED,
    "checked_at": 1790000100,
    "created_at": 1790000000,
}
EndpointState = Literal["pending", "ready", "unreachable", "rejected", "failed"]

API_KEY_PATTERN = r"^[\x21-\x7e]+$"
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


class ServingEndpointRequest(Strict):
    """A running inference server."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "name": "vllm-1",
                "base_model": "smollm2",
                "url": "http://127.0.0.1:8100",
                "adapter_folder": "/srv/adapters",
            }
        }
    )
    name: Annotated[
        str,
        Field(
            max_length=64,
            description="Name that identifies the endpoint.",
            json_schema_extra={"pattern": LABEL_PATTERN},
        ),
    ]
    base_model: Annotated[
        str,
        Field(min_length=1, max_length=256, description="The base model it serves.", json_schema_extra=WITHOUT_NUL),
    ]
    kind: EngineKind = Field(default="vllm", description="The server's software.")
    url: Annotated[
        str,
        Field(
            min_length=1,
            max_length=MAX_URL,
            description="Address, with or without /v1, such as http://127.0.0.1:8100.",
            json_schema_extra={"pattern": r"^https?://[\x21-\x7e]+$"},
        ),
    ]
    adapter_folder: Annotated[
        str,
        Field(
            min_length=1,
            max_length=MAX_FOLDER,
            description="Absolute path of a folder that the API servers and the inference server see at the same path.",
            json_schema_extra=WITHOUT_NUL,
        ),
    ]
    max_rank: int = Field(
        default=DEFAULT_MAX_RANK,
        ge=1,
        le=VLLM_RANKS[-1],
        description="Highest rank that the server loads: the value of vLLM's --max-lora-rank.",
    )
    api_key: Annotated[str, Field(min_length=1, max_length=MAX_KEY, pattern=API_KEY_PATTERN)] | None = Field(
        default=None,
        description="The server's own API key. It is stored encrypted and never shown. Null: requests have none.",
    )

    def new_endpoint(self) -> NewEndpoint:
        return NewEndpoint(**self.model_dump())


class ServingEndpointReport(Strict):
    """A report of the program that starts the server."""

    model_config = ConfigDict(json_schema_extra={"example": {"error": "ModuleNotFoundError: No module named 'numpy'"}})
    error: Annotated[str, Field(min_length=1, max_length=MAX_REPORT, json_schema_extra=WITHOUT_NUL)] | None = Field(
        description="Why the server can't be started. null: it is being started again."
    )


class ProbeVerification(BaseModel):
    """Comparison of the server's greedy answer to a probe prompt with that of the built-in engine.

    `max_diff`: largest difference of the tokens' log-probabilities. `num_compared`: tokens until the answers differ or
    end. For adapters, `distance_to_base` is that of the base model's answer, and `distinguishes` is whether the
    comparison can distinguish them.
    """

    model_config = ConfigDict(extra="allow")
    passed: bool = Field(description="Whether the answers agree within the tolerance.")
    max_diff: float = Field(description="Largest difference of log-probabilities of one token.")
    tolerance: float = Field(description="Largest accepted `max_diff`.")
    num_compared: int = Field(description="Number of compared tokens: those until the answers differ or end.")
    prompt_tokens: int = Field(description="Number of tokens of the prompt on the server.")
    expected_prompt_tokens: int = Field(description="Number of tokens of the prompt in the built-in engine.")
    distance_to_base: float | None = Field(
        default=None,
        description="`max_diff` between the adapter and the base model, in the built-in engine; null for base models.",
    )
    distinguishes: bool | None = Field(
        default=None, description="Whether a server that ignores the adapter would fail; null for base models."
    )


class ServingEndpointObject(BaseModel):
    """A running inference server that loads adapters."""

    model_config = ConfigDict(json_schema_extra={"example": ENDPOINT})
    object: Literal["serving_endpoint"] = "serving_endpoint"
    id: ObjectId
    name: str = Field(description="Unique name of the endpoint.")
    kind: EngineKind = Field(description="Software of the server.")
    base_model: BaseName
    base_digest: BaseDigest
    url: str | None = Field(description="Shown only to operators.")
    adapter_folder: str | None = Field(description="Shown only to operators.")
    has_api_key: bool = Field(description="Whether requests to the server carry an API key.")
    max_rank: int = Field(description="Highest LoRA rank that the server loads.")
    state: EndpointState = Field(
        description="ready: answers requests. unreachable: does not respond any more. rejected: responds, but not as "
        "required. pending: has not responded yet, or is not verified yet. failed: the program that starts the server "
        "has reported that it can't."
    )
    last_error: str | None = Field(description="Why it is not ready. Shown only to operators.")
    served_model: str | None = Field(description="The server's name of the base model. Shown only to operators.")
    verification: ProbeVerification | None = Field(
        description="Comparison of the base model's answer with the built-in engine's; null before."
    )
    checked_at: int | None = Field(description="Time of the last check, in Unix seconds; null before the first.")
    created_at: CreatedAt


class ServingEndpointDeleted(BaseModel):
    """Confirmation that an endpoint is removed."""

    id: ObjectId
    object: Literal["serving_endpoint"] = "serving_endpoint"
    deleted: Deleted = True


def serving_endpoint_object(row: ServingEndpoint, *, shows_address: bool) -> ServingEndpointObject:
    return ServingEndpointObject.model_validate(
        {
            "id": row.id,
            "name": row.name,
            "kind": row.kind,
            "base_model": row.base_model,
            "base_digest": row.base_digest,
            "url": row.url if shows_address else None,
            "adapter_folder": row.adapter_folder if shows_address else None,
            "has_api_key": row.sealed_key is not None,
            "max_rank": row.max_rank,
            "state": row.state,
            "last_error": row.last_error if shows_address else None,
            "served_model": row.served_model if shows_address else None,
            "verification": row.verification,
            "checked_at": None if row.checked_at is None else int(row.checked_at),
            "created_at": int(row.created_at),
        }
    )


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
