"""Schemas of usage reports."""

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
    "completions": {"requests": 40, "prompt_tokens": 5200, "completion_tokens": 1900},
    "stored_bytes": 81_788_928,
}
_BUCKET: dict[str, Any] = {
    "object": "bucket",
    "start_time": 1789948800,
    "end_time": 1790035200,
    "results": [_RESULT],
}


class JobCounts(BaseModel):
    """Jobs created, and jobs finished, on the day."""

    created: int = Field(description="Number of jobs created.")
    succeeded: int = Field(description="Number of jobs that succeeded.")
    failed: int = Field(description="Number of jobs that failed.")
    cancelled: int = Field(description="Number of jobs that were cancelled.")


class CompletionCounts(BaseModel):
    """Inference requests answered on the day, and their tokens."""

    requests: int = Field(description="Number of answered requests.")
    prompt_tokens: int = Field(description="Number of tokens in their prompts.")
    completion_tokens: int = Field(description="Number of tokens in their answers.")


class UsageResult(BaseModel):
    """Usage of one day."""

    model_config = ConfigDict(json_schema_extra={"example": _RESULT})
    object: Literal["usage.result"] = "usage.result"
    organization_id: str | None = Field(description="Null unless grouped by organization.")
    project_id: str | None = Field(description="Null unless grouped by project.")
    model: str | None = Field(description="Base model; null unless grouped by model.")
    device_seconds: float = Field(description="Device time in seconds, split among the jobs that train on the device.")
    trained_tokens: int = Field(description="Trained tokens of the jobs that succeeded on the day.")
    num_jobs: JobCounts = Field(description="Jobs created and finished on the day.")
    completions: CompletionCounts = Field(description="Inference requests answered on the day.")
    stored_bytes: int | None = Field(
        description="Bytes that the project stores, at the end of the day or now. Null if grouped by model, and "
        "on future days."
    )


class UsageBucket(BaseModel):
    """One day, in UTC."""

    model_config = ConfigDict(json_schema_extra={"example": _BUCKET})
    object: Literal["bucket"] = "bucket"
    start_time: int = Field(description="Start of the day, in Unix seconds.")
    end_time: int = Field(description="End of the day, in Unix seconds; it belongs to the next day.")
    results: list[UsageResult] = Field(description="Empty if nothing was used.")


class UsagePage(BaseModel):
    """A page of days, earliest first. To get the next page, pass `next_page` as `page`."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"object": "page", "data": [_BUCKET], "has_more": False, "next_page": None}}
    )
    object: Literal["page"] = "page"
    data: list[UsageBucket] = Field(description="Days of this page.")
    has_more: bool = Field(description="Whether there are more days after this page.")
    next_page: str | None = Field(description="Value of `page` for the next page; null on the last one.")


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
        completions=CompletionCounts(
            requests=int(amounts["num_completions"]),
            prompt_tokens=int(amounts["prompt_tokens"]),
            completion_tokens=int(amounts["completion_tokens"]),
        ),
        stored_bytes=used.stored_bytes,
    )
