"""Schemas of webhook endpoints, compatible with OpenAI's API, and of their delivery log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from api.schemas.keys import NAME
from catalog.spec.strict import LAST_SECOND, Strict
from catalog.tables.webhooks import WebhookDelivery, WebhookEndpoint, WebhookTry
from catalog.webhooks.delivery_log import Status
from catalog.webhooks.outbox import EVENT_TYPES, EventType
from catalog.webhooks.url_policy import MAX_URL

DAY = 86_400
ID = "webhook-3f2b8c9d0a1e4f5a6b7c8d9e"
JOB_ENDS = ["fine_tuning.job.failed", "fine_tuning.job.succeeded"]
ENDPOINT: dict[str, Any] = {
    "object": "webhook_endpoint",
    "id": ID,
    "name": "chat ops",
    "url": "https://example.com/…x7Qk",
    "event_types": JOB_ENDS,
    "signing_secret_hint": "whsec_…x9Qz",
    "status": "enabled",
    "created_at": 1790000000,
    "updated_at": 1790000000,
    "old_secret_until": None,
    "failing_since": None,
    "disabled_at": None,
    "disabled_reason": None,
}
REQUEST: dict[str, Any] = {"name": "chat ops", "url": "https://example.com/hooks", "event_types": JOB_ENDS}
DELIVERY: dict[str, Any] = {
    "object": "webhook_delivery",
    "id": "delivery-7d0c2f51a9b84e63c1d2e3f4",
    "webhook_endpoint_id": ID,
    "event_id": "evt-5b7d1c0e9f3a4c2b8d6e7f01",
    "event_type": "fine_tuning.job.succeeded",
    "data": {"id": "ftjob-1c0ffee0a1b2c3d4e5f60718"},
    "is_test": False,
    "status": "delivered",
    "created_at": 1790000100,
    "ended_at": 1790000101,
    "next_try_at": None,
    "tries": [{"started_at": 1790000100, "seconds": 0.21, "status_code": 204, "error": None, "reply": ""}],
}
Name = Annotated[str, Field(min_length=1, max_length=255, pattern=NAME, description="Display name.")]
Url = Annotated[str, Field(min_length=1, max_length=MAX_URL, description="URL to which events are posted.")]
Types = Annotated[
    list[EventType], Field(min_length=1, max_length=2 * len(EVENT_TYPES), description="Event types to send.")
]


class WebhookEndpointRequest(Strict):
    """A new endpoint."""

    model_config = ConfigDict(json_schema_extra={"example": REQUEST})
    name: Name
    url: Url
    event_types: Types


class WebhookEndpointChange(Strict):
    """Changes of an endpoint. Omitted fields stay unchanged."""

    model_config = ConfigDict(json_schema_extra={"example": {"enabled": True}})
    name: Name | None = None
    url: Url | None = None
    event_types: Types | None = None
    enabled: bool | None = Field(
        default=None, description="`false`: nothing is sent; events are kept for replay. `true`: enable it again."
    )


class SecretRotation(Strict):
    """The time for which the old secret stays valid."""

    model_config = ConfigDict(json_schema_extra={"example": {"overlap_seconds": DAY}})
    keep_old_secret_active_for_24_hours: bool = False
    overlap_seconds: int | None = Field(
        default=None, ge=0, le=30 * DAY, description="Overlap in seconds. Mutually exclusive with the other field."
    )

    @model_validator(mode="after")
    def _check_exactly_one(self) -> SecretRotation:
        if self.overlap_seconds is not None and self.keep_old_secret_active_for_24_hours:
            raise ValueError("must have 'overlap_seconds' or 'keep_old_secret_active_for_24_hours', not both")
        return self

    def seconds(self) -> int:
        return self.overlap_seconds or (DAY if self.keep_old_secret_active_for_24_hours else 0)


class WebhookTestRequest(Strict):
    """The sample event to send."""

    model_config = ConfigDict(json_schema_extra={"example": {"event_type": "fine_tuning.job.succeeded"}})
    event_type: EventType


class ReplayRequest(Strict):
    """The failed deliveries to send again."""

    model_config = ConfigDict(json_schema_extra={"example": {"since": 1790000000}})
    since: int = Field(ge=0, le=LAST_SECOND, description="Unix time; earlier events are not sent again.")


class WebhookEndpointObject(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": ENDPOINT})

    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    id: str
    name: str
    url: str = Field(
        description="Host and last four characters. The whole URL is stored encrypted; only the response that creates "
        "the endpoint has it."
    )
    event_types: list[str]
    signing_secret_hint: str
    status: Literal["enabled", "disabled"]
    created_at: int
    updated_at: int
    old_secret_until: int | None = Field(
        description="Unix time until which messages are also signed with the old secret."
    )
    failing_since: int | None = Field(
        description="Every attempt since this time has failed. After five days the endpoint is disabled."
    )
    disabled_at: int | None
    disabled_reason: str | None = Field(description="`by_request`, `gone` (it answered 410) or `failing`.")


class WebhookEndpointWithSecret(WebhookEndpointObject):
    """An endpoint with its secret, which no later response contains."""

    model_config = ConfigDict(json_schema_extra={"example": {**ENDPOINT, "signing_secret": "whsec_…"}})
    signing_secret: str = Field(description="The secret to pass to `client.webhooks.unwrap`.")


class WebhookEndpointDeleted(BaseModel):
    model_config = ConfigDict(
        json_schema_extra={"example": {"id": ID, "object": "webhook_endpoint.deleted", "deleted": True}}
    )
    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: Literal[True] = True


class WebhookTestResult(BaseModel):
    """The endpoint's answer to a test. If it does not answer, the request fails and the error explains the reason."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "object": "webhook_endpoint.test",
                "webhook_endpoint_id": ID,
                "event_type": "fine_tuning.job.succeeded",
                "status_code": 204,
                "success": True,
                "delivery_id": DELIVERY["id"],
                "reply": "",
            }
        }
    )
    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True] = Field(default=True, description="Whether the endpoint answered, with any `status_code`.")
    delivery_id: str
    reply: str = Field(description="The first bytes of the response, escaped.")


class WebhookEventTypes(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": {"object": "list", "data": list(EVENT_TYPES)}})

    object: Literal["list"] = "list"
    data: list[str]


class TryObject(BaseModel):
    started_at: int
    seconds: float
    status_code: int | None = Field(description="Null if there was no response; `error` contains the reason.")
    error: str | None
    reply: str | None = Field(description="The first bytes of the response, escaped.")


class WebhookDeliveryObject(BaseModel):
    """One event for one endpoint."""

    model_config = ConfigDict(json_schema_extra={"example": DELIVERY})
    object: Literal["webhook_delivery"] = "webhook_delivery"
    id: str
    webhook_endpoint_id: str
    event_id: str = Field(description="The `webhook-id` header, the same in every attempt.")
    event_type: str
    data: dict[str, Any]
    is_test: bool
    status: Status
    created_at: int
    ended_at: int | None
    next_try_at: int | None
    tries: list[TryObject] = Field(description="Attempts, oldest first.")


class Replayed(BaseModel):
    model_config = ConfigDict(
        json_schema_extra={"example": {"object": "webhook_endpoint.replay", "webhook_endpoint_id": ID, "replayed": 3}}
    )
    object: Literal["webhook_endpoint.replay"] = "webhook_endpoint.replay"
    webhook_endpoint_id: str
    replayed: int = Field(description="Number of deliveries that are sent again.")


def endpoint_object(row: WebhookEndpoint, *, now: float) -> WebhookEndpointObject:
    return WebhookEndpointObject.model_validate(_fields(row, now))


def with_secret(row: WebhookEndpoint, secret: str, *, now: float) -> WebhookEndpointWithSecret:
    return WebhookEndpointWithSecret.model_validate({**_fields(row, now), "signing_secret": secret})


def delivery_object(row: WebhookDelivery, tries: Sequence[WebhookTry]) -> WebhookDeliveryObject:
    return WebhookDeliveryObject(
        id=row.id,
        webhook_endpoint_id=row.endpoint_id,
        event_id=row.event_id,
        event_type=row.event_type,
        data=row.data,
        is_test=row.is_test,
        status=_status(row.status),
        created_at=int(row.created_at),
        ended_at=_second(row.ended_at),
        next_try_at=_second(row.next_try_at),
        tries=[_try_object(one) for one in tries],
    )


def _try_object(row: WebhookTry) -> TryObject:
    return TryObject(
        started_at=int(row.started_at),
        seconds=row.seconds,
        status_code=row.status_code,
        error=row.error,
        reply=row.reply,
    )


def _fields(row: WebhookEndpoint, now: float) -> dict[str, Any]:
    overlaps = row.previous_until is not None and row.previous_until > now
    return {
        "id": row.id,
        "name": row.name,
        "url": row.url,
        "event_types": row.event_types,
        "signing_secret_hint": f"whsec_…{row.ending}",
        "status": "enabled" if row.disabled_at is None else "disabled",
        "created_at": int(row.created_at),
        "updated_at": int(row.updated_at),
        "old_secret_until": _second(row.previous_until) if overlaps else None,
        "failing_since": _second(row.failing_since),
        "disabled_at": _second(row.disabled_at),
        "disabled_reason": row.disabled_reason,
    }


def _status(text: str) -> Status:
    return "delivered" if text == "delivered" else "failed" if text == "failed" else "pending"


def _second(moment: float | None) -> int | None:
    return None if moment is None else int(moment)
