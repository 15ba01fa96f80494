"""Schemas of webhook endpoints, compatible with OpenAI's API, and of their delivery log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from api.schemas import CreatedAt, ObjectId, UpdatedAt
from api.schemas.keys import NAME
from catalog.spec.model_fields import LAST_SECOND, Strict
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
Name = Annotated[str, Field(min_length=1, max_length=255, pattern=NAME, description="Display name of the endpoint.")]
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
    keep_old_secret_active_for_24_hours: bool = Field(
        default=False, description="Whether the old secret stays valid for 24 hours, as in OpenAI's API."
    )
    overlap_seconds: int | None = Field(
        default=None,
        ge=0,
        le=30 * DAY,
        description="Overlap in seconds. Mutually exclusive with the other field. Null: 0, unless that is true.",
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
    event_type: EventType = Field(description="Type of the sample event.")


class ReplayRequest(Strict):
    """The failed deliveries to send again."""

    model_config = ConfigDict(json_schema_extra={"example": {"since": 1790000000}})
    since: int = Field(ge=0, le=LAST_SECOND, description="Unix seconds; earlier events are not sent again.")


class WebhookEndpointObject(BaseModel):
    """An endpoint to which events are posted."""

    model_config = ConfigDict(json_schema_extra={"example": ENDPOINT})

    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    id: ObjectId
    name: str = Field(description="Display name of the endpoint.")
    url: str = Field(
        description="Host and last four characters. The whole URL is stored encrypted; only the response that creates "
        "the endpoint has it."
    )
    event_types: list[str] = Field(description="Types of events that are sent to it.")
    signing_secret_hint: str = Field(description="The last characters of its secret, to distinguish secrets.")
    status: Literal["enabled", "disabled"] = Field(description="Whether events are sent to it.")
    created_at: CreatedAt
    updated_at: UpdatedAt
    old_secret_until: int | None = Field(
        description="Unix seconds until which messages are also signed with the old secret; null if there is none."
    )
    failing_since: int | None = Field(
        description="Unix seconds since which every attempt has failed. After five days the endpoint is "
        "disabled. Null: none failed."
    )
    disabled_at: int | None = Field(
        description="Time at which it was disabled, in Unix seconds; null while it is enabled."
    )
    disabled_reason: str | None = Field(description="`by_request`, `gone` (it answered 410) or `failing`.")


class WebhookEndpointWithSecret(WebhookEndpointObject):
    """An endpoint with its secret, which no later response contains."""

    model_config = ConfigDict(json_schema_extra={"example": {**ENDPOINT, "signing_secret": "whsec_…"}})
    signing_secret: str = Field(description="The secret to pass to `client.webhooks.unwrap`.")


class WebhookEndpointDeleted(BaseModel):
    """Confirmation that an endpoint is deleted."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"id": ID, "object": "webhook_endpoint.deleted", "deleted": True}}
    )
    id: ObjectId
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: Literal[True] = Field(default=True, description="Always true: the endpoint is deleted.")


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
    webhook_endpoint_id: str = Field(description="ID of the tested endpoint.")
    event_type: str = Field(description="Type of the sample event.")
    status_code: int = Field(description="HTTP status of the endpoint's answer.")
    success: Literal[True] = Field(default=True, description="Whether the endpoint answered, with any `status_code`.")
    delivery_id: str = Field(description="ID of the delivery that records the test.")
    reply: str = Field(description="The first bytes of the response, escaped.")


class WebhookEventTypes(BaseModel):
    """The types of events that an endpoint can receive."""

    model_config = ConfigDict(json_schema_extra={"example": {"object": "list", "data": list(EVENT_TYPES)}})

    object: Literal["list"] = "list"
    data: list[str] = Field(description="Names of the event types.")


class TryObject(BaseModel):
    """One attempt to deliver an event."""

    started_at: int = Field(description="Time of the request, in Unix seconds.")
    seconds: float = Field(description="Duration of the request, in seconds.")
    status_code: int | None = Field(description="Null if there was no response; `error` contains the reason.")
    error: str | None = Field(description="Reason why there was no response; null if there was one.")
    reply: str | None = Field(description="The first bytes of the response, escaped.")


class WebhookDeliveryObject(BaseModel):
    """One event for one endpoint."""

    model_config = ConfigDict(json_schema_extra={"example": DELIVERY})
    object: Literal["webhook_delivery"] = "webhook_delivery"
    id: ObjectId
    webhook_endpoint_id: str = Field(description="ID of the endpoint that receives the event.")
    event_id: str = Field(description="The `webhook-id` header, the same in every attempt.")
    event_type: str = Field(description="Type of the event that is sent.")
    data: dict[str, Any] = Field(description="Object of the event: the ID of the job or the endpoint.")
    is_test: bool = Field(description="Whether a test request caused it.")
    status: Status = Field(
        description="`pending`: it will be sent or retried. `delivered`: the endpoint accepted it. `failed`: it is not "
        "retried."
    )
    created_at: CreatedAt
    ended_at: int | None = Field(
        description="Time of the success or the last failure, in Unix seconds; null while it is pending."
    )
    next_try_at: int | None = Field(description="Time of the next attempt, in Unix seconds; null unless it is pending.")
    tries: list[TryObject] = Field(description="Attempts, oldest first.")


class Replayed(BaseModel):
    """Deliveries that are sent again."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"object": "webhook_endpoint.replay", "webhook_endpoint_id": ID, "replayed": 3}}
    )
    object: Literal["webhook_endpoint.replay"] = "webhook_endpoint.replay"
    webhook_endpoint_id: str = Field(description="ID of the endpoint that receives them.")
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
