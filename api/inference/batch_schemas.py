"""Schemas of batches, in OpenAI's format."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from api.schemas import CreatedAt, ObjectId
from api.schemas.files import ExpiresAfter
from catalog.batches.commands import BatchStatus, Endpoint
from catalog.spec.job import MAX_KEY_LENGTH, MAX_PAIRS, MAX_VALUE_LENGTH, Id
from catalog.spec.model_fields import WITHOUT_NUL, Strict
from catalog.tables.serving import Batch

MAX_CUSTOM_ID_CHARS = 512


class BatchRequest(Strict):
    """The body of POST /v1/batches."""

    input_file_id: Id = Field(description="ID of a file with the purpose batch: one request as JSON on each line.")
    endpoint: Endpoint = Field(description="The endpoint of all its requests.")
    completion_window: Literal["24h"] = Field(description="Time after which unfinished requests expire.")
    metadata: dict[str, Annotated[str, Field(json_schema_extra={"maxLength": MAX_VALUE_LENGTH})]] | None = Field(
        default=None,
        description="Labels of the batch, as key-value pairs. Null: none.",
        json_schema_extra={
            "maxProperties": MAX_PAIRS,
            "propertyNames": {"minLength": 1, "maxLength": MAX_KEY_LENGTH},
        },
    )
    output_expires_after: ExpiresAfter | None = Field(
        default=None, description="Lifetime of the output files. Default: they are kept until they are deleted."
    )

    @field_validator("metadata")
    @classmethod
    def _metadata_limits(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        pairs = list((value or {}).items())
        if len(pairs) > MAX_PAIRS:
            raise ValueError(f"must have at most {MAX_PAIRS} pairs")
        if any(not 1 <= len(key) <= MAX_KEY_LENGTH or len(text) > MAX_VALUE_LENGTH for key, text in pairs):
            raise ValueError(
                f"must have keys of 1 to {MAX_KEY_LENGTH} and values of at most {MAX_VALUE_LENGTH} characters"
            )
        return value


class BatchInputLine(Strict):
    """One line of the input file of a batch."""

    verbatim = frozenset({"body"})
    custom_id: Annotated[str, Field(min_length=1, max_length=MAX_CUSTOM_ID_CHARS, json_schema_extra=WITHOUT_NUL)]
    """Identifies the request in the output files. Unique within the file."""
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


class BatchErrorObject(BaseModel):
    """A problem of the batch's input file."""

    code: str | None = Field(description="Stable name of the error, for programs.")
    message: str | None = Field(description="The problem and how to fix it.")
    param: str | None = Field(description="Dotted path of the invalid field; null if there is none.")
    line: int | None = Field(description="Line of the input file, from 1.")


class BatchErrors(BaseModel):
    """Problems of the batch's input file."""

    object: Literal["list"] = "list"
    data: list[BatchErrorObject] = Field(description="The problems, by line.")


class RequestCounts(BaseModel):
    """Numbers of requests in the batch."""

    total: int = Field(description="Number of all requests; 0 until the input file is validated.")
    completed: int = Field(description="Number of requests with a response.")
    failed: int = Field(description="Number of requests with an error.")


class CachedTokens(BaseModel):
    """Part of the input tokens, for compatibility."""

    cached_tokens: int = Field(default=0, description="Always 0: cached tokens are not counted separately.")


class ReasoningTokens(BaseModel):
    """Part of the output tokens, for compatibility."""

    reasoning_tokens: int = Field(default=0, description="Always 0: reasoning tokens are not counted separately.")


class BatchUsage(BaseModel):
    """Tokens of all requests of the batch."""

    input_tokens: int = Field(description="Number of tokens in the prompts.")
    input_tokens_details: CachedTokens = Field(description="Part of the input tokens, for compatibility.")
    output_tokens: int = Field(description="Number of tokens in the answers.")
    output_tokens_details: ReasoningTokens = Field(description="Part of the output tokens, for compatibility.")
    total_tokens: int = Field(description="Number of tokens in prompts and answers.")


BATCH_EXAMPLE: dict[str, Any] = {
    "id": "batch-3f2b8c9d0a1e4f5a6b7c8d9e",
    "object": "batch",
    "endpoint": "/v1/chat/completions",
    "input_file_id": "file-3f2b8c9d0a1e4f5a6b7c8d9e",
    "completion_window": "24h",
    "status": "completed",
    "output_file_id": "file-4a3b8c9d0a1e4f5a6b7c8d9e",
    "error_file_id": None,
    "errors": None,
    "created_at": 1790000000,
    "in_progress_at": 1790000002,
    "expires_at": 1790086400,
    "finalizing_at": 1790000300,
    "completed_at": 1790000301,
    "failed_at": None,
    "expired_at": None,
    "cancelling_at": None,
    "cancelled_at": None,
    "request_counts": {"total": 100, "completed": 100, "failed": 0},
    "usage": {
        "input_tokens": 4200,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 1800,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 6000,
    },
    "metadata": {"run": "evaluation"},
}


class BatchObject(BaseModel):
    """A file of requests that are answered at low priority within 24 hours."""

    model_config = ConfigDict(json_schema_extra={"example": BATCH_EXAMPLE})
    id: ObjectId
    object: Literal["batch"] = "batch"
    endpoint: str = Field(description="Path that answers the requests.")
    input_file_id: str = Field(description="ID of the file with the requests.")
    completion_window: Literal["24h"] = Field(default="24h", description="Time after which unfinished requests expire.")
    status: BatchStatus = Field(description="Status of the batch, as in OpenAI's API.")
    output_file_id: str | None = Field(description="File with the responses, once the batch has ended.")
    error_file_id: str | None = Field(description="File with the errors of the requests without a response.")
    errors: BatchErrors | None = Field(description="Why the batch failed: its invalid lines, or its damaged file.")
    created_at: CreatedAt
    in_progress_at: int | None = Field(description="Start of the requests, in Unix seconds; null before.")
    expires_at: int = Field(description="Time after which unfinished requests expire, in Unix seconds.")
    finalizing_at: int | None = Field(
        description="Time at which the output files began to be written, in Unix seconds; null before."
    )
    completed_at: int | None = Field(description="Time of the completion, in Unix seconds; null unless completed.")
    failed_at: int | None = Field(description="Time of the failure, in Unix seconds; null unless failed.")
    expired_at: int | None = Field(
        description="Time at which the batch ended as expired, in Unix seconds; null unless expired."
    )
    cancelling_at: int | None = Field(description="Time of the request to cancel, in Unix seconds; null without one.")
    cancelled_at: int | None = Field(
        description="Time at which the batch ended as cancelled, in Unix seconds; null unless cancelled."
    )
    request_counts: RequestCounts = Field(description="Numbers of requests by outcome.")
    usage: BatchUsage = Field(description="Tokens of the requests so far.")
    metadata: dict[str, str] | None = Field(description="Labels of the batch; null without labels.")


def batch_object(row: Batch) -> BatchObject:
    finished_at = _seconds(row.finished_at)
    errors = None
    if row.errors is not None:
        errors = BatchErrors(data=[BatchErrorObject.model_validate(error) for error in row.errors])
    return BatchObject(
        id=row.id,
        endpoint=row.endpoint,
        input_file_id=row.input_file,
        status=row.status,  # pyright: ignore[reportArgumentType]
        output_file_id=row.output_file,
        error_file_id=row.error_file,
        errors=errors,
        created_at=int(row.created_at),
        in_progress_at=_seconds(row.in_progress_at),
        expires_at=int(row.expires_at),
        finalizing_at=_seconds(row.finalizing_at),
        completed_at=finished_at if row.status == "completed" else None,
        failed_at=finished_at if row.status == "failed" else None,
        expired_at=finished_at if row.status == "expired" else None,
        cancelling_at=_seconds(row.cancelling_at),
        cancelled_at=finished_at if row.status == "cancelled" else None,
        request_counts=RequestCounts(total=row.num_lines, completed=row.num_completed, failed=row.num_failed),
        usage=BatchUsage(
            input_tokens=row.prompt_tokens,
            input_tokens_details=CachedTokens(),
            output_tokens=row.completion_tokens,
            output_tokens_details=ReasoningTokens(),
            total_tokens=row.prompt_tokens + row.completion_tokens,
        ),
        metadata=row.labels,
    )


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)
