"""What was used."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from catalog.usage.ledger import DAY_SECONDS
from catalog.usage.report import Day, Report, Used

_RESULT: dict[str, Any] = {
    "object": "usage.result",
    "organization_id": None,
    "project_id": "proj-3f2b8c9d0a1e4f5a6b7c8d9e",
    "model": None,
    "device_seconds": 5400.5,
    "trained_tokens": 1_200_000,
    "num_jobs": {"created": 5, "succeeded": 3, "failed": 1, "cancelled": 0},
    "stored_bytes": 81_788_928,
}
_BUCKET: dict[str, Any] = {
    "object": "bucket",
    "start_time": 1789948800,
    "end_time": 1790035200,
    "results": [_RESULT],
}


class JobCounts(BaseModel):
    """Jobs that were created on the day, and those that ended on it."""

    created: int
    succeeded: int
    failed: int
    cancelled: int


class UsageResult(BaseModel):
    """What was used on a day."""

    model_config = ConfigDict(json_schema_extra={"example": _RESULT})
    object: Literal["usage.result"] = "usage.result"
    organization_id: str | None = Field(description="null where it isn't grouped by organization.")
    project_id: str | None = Field(description="null where it isn't grouped by project.")
    model: str | None = Field(description="The base model; null where it isn't grouped by that.")
    device_seconds: float = Field(description="Seconds of a device, divided among the jobs that train on it.")
    trained_tokens: int = Field(description="Of jobs that succeeded, on the day of their end.")
    num_jobs: JobCounts
    stored_bytes: int | None = Field(
        description="Of all that the project stores, at the end of the day, or now. null by base model, and on days "
        "to come."
    )


class UsageBucket(BaseModel):
    """A day, in UTC."""

    model_config = ConfigDict(json_schema_extra={"example": _BUCKET})
    object: Literal["bucket"] = "bucket"
    start_time: int
    end_time: int
    results: list[UsageResult] = Field(description="Empty where nothing was used.")


class UsagePage(BaseModel):
    """Some days, the earliest first. Go on with `page` = `next_page`."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"object": "page", "data": [_BUCKET], "has_more": False, "next_page": None}}
    )
    object: Literal["page"] = "page"
    data: list[UsageBucket]
    has_more: bool
    next_page: str | None


def usage_page(found: Report) -> UsagePage:
    return UsagePage(
        data=[_bucket(day) for day in found.days],
        has_more=found.next_day is not None,
        next_page=None if found.next_day is None else str(found.next_day),
    )


def _bucket(day: Day) -> UsageBucket:
    start = day.day * DAY_SECONDS
    return UsageBucket(start_time=start, end_time=start + DAY_SECONDS, results=[_result(used) for used in day.used])


def _result(used: Used) -> UsageResult:
    amounts = used.amounts
    ended = {name: int(amounts[f"num_{name}"]) for name in ("created", "succeeded", "failed", "cancelled")}
    return UsageResult(
        organization_id=used.organization_id,
        project_id=used.project_id,
        model=used.model,
        device_seconds=amounts["device_seconds"],
        trained_tokens=int(amounts["trained_tokens"]),
        num_jobs=JobCounts(**ended),
        stored_bytes=used.stored_bytes,
    )
