"""The schema of error responses, which the openai client can read."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, computed_field

from api.errors.links import doc_url
from api.schemas import ErrorCode, ErrorMessage


class QuotaReached(BaseModel):
    """A quota of a project that has been reached."""

    name: str = Field(description="Quota of the project, such as `jobs_per_day`.")
    limit: float = Field(description="Maximum of the quota, in the unit of its name.")
    used: float = Field(description="Current usage, in the unit of the quota.")
    resets_at: int | None = Field(
        description="Unix seconds at which the usage resets or enough quota is free; null if that is not automatic."
    )


class ErrorBody(BaseModel):
    """Details of an error."""

    message: str = Field(description="The problem, followed by the remedy.")
    remedy: str = Field(description="How to fix the problem. The message ends with this text.")
    type: str = Field(description="Class of the error, such as invalid_request_error.")
    param: str | None = Field(description="Dotted path of the invalid field.")
    code: str | None = Field(description="Stable name of the error for programs.")
    doc_url: str = Field(description="Entry of the code in the error reference.")
    quota: QuotaReached | None = Field(default=None, description="The quota that is reached; only with quota_exceeded.")


class StoredError(BaseModel):
    """The error of a job, a plan, a sweep or an import."""

    model_config = ConfigDict(extra="allow")
    code: ErrorCode
    message: ErrorMessage
    param: str | None = Field(
        default=None, description="Dotted path of the field that caused the problem; null if none did."
    )

    @computed_field(description="Entry of the code in the error reference.")
    @property
    def doc_url(self) -> str:
        return doc_url(self.code)


class ErrorResponse(BaseModel):
    """The body of every response with a status of 400 or more."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "error": {
                    "message": "'lora.rank' must be at least 1; got 0. Correct the request and send it again.",
                    "remedy": "Correct the request and send it again.",
                    "type": "invalid_request_error",
                    "param": "lora.rank",
                    "code": "invalid_value",
                    "doc_url": "https://lorry.example.com/dashboard/errors.html#invalid_value",
                }
            }
        }
    )
    error: ErrorBody = Field(description="The error, in OpenAI's format with additional fields.")
