"""The one shape of every refusal, as the openai client reads it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class QuotaReached(BaseModel):
    """A limit of a project."""

    name: str
    limit: float
    used: float
    resets_at: int | None = Field(
        description="When it begins anew or enough of it is free, in seconds since 1970; null: not by itself."
    )


class ErrorBody(BaseModel):
    message: str = Field(description="What is wrong, and what to do about it.")
    remedy: str = Field(description="What to do about it, by itself; the message ends with it.")
    type: str = Field(description="Class of the error, such as invalid_request_error.")
    param: str | None = Field(description="The field that is at fault, as a dotted path.")
    code: str | None = Field(description="The error's name, to program against.")
    quota: QuotaReached | None = Field(default=None, description="Of quota_exceeded alone: what is reached.")


class ErrorResponse(BaseModel):
    """Every answer with a status of 400 or more."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "error": {
                    "message": "'lora.rank' must be at least 1; it was 0. Correct this and send the request again.",
                    "remedy": "Correct this and send the request again.",
                    "type": "invalid_request_error",
                    "param": "lora.rank",
                    "code": "invalid_value",
                }
            }
        }
    )
    error: ErrorBody
