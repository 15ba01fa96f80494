"""Schemas of uploaded files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from api.schemas import CreatedAt, Deleted, ObjectId
from catalog.datasets.formats import KIND_NAMES
from catalog.spec.strict import Strict
from catalog.storage.files import LIFETIME_SECONDS
from catalog.tables.storage import File


class FileObject(BaseModel):
    """A file. The rows of a file with the purpose `fine-tune` were validated at upload."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "file-3f2b8c9d0a1e4f5a6b7c8d9e",
                "object": "file",
                "bytes": 52133,
                "created_at": 1790000000,
                "filename": "train.jsonl",
                "purpose": "fine-tune",
                "status": "processed",
                "expires_at": None,
                "status_details": None,
                "rows": 410,
                "kind": "chat",
                "digest": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            }
        }
    )
    id: ObjectId
    object: Literal["file"] = "file"
    bytes: int = Field(description="Size of the content, in bytes.")
    created_at: CreatedAt
    filename: str = Field(description="Name of the file as uploaded.")
    purpose: str = Field(description="Use of the file: `fine-tune`, `batch`, `user_data`, or a kind of result file.")
    status: Literal["uploaded", "processed", "error"] = Field(
        default="processed", description="Always `processed`: the rows are validated before the upload is answered."
    )
    expires_at: int | None = Field(
        description="Unix seconds after which it is deleted, once no unfinished job uses it. Null: it does not expire."
    )
    status_details: str | None = Field(default=None, description="Always null: an invalid file is rejected at upload.")
    rows: int | None = Field(description="Number of rows of a dataset; null for other purposes.")
    kind: str | None = Field(description=f"Kind of its rows: {', '.join(KIND_NAMES)}; null for other purposes.")
    digest: str = Field(description="SHA-256 of the content.")
    same_content_as: str | None = Field(
        default=None, description="In an upload's response: an earlier file of the project with the same bytes."
    )


class ExpiresAfter(Strict):
    """The expiry of a file, as in OpenAI's API."""

    anchor: Literal["created_at"] = Field(description="Time from which the seconds count.")
    seconds: int = Field(
        ge=LIFETIME_SECONDS[0], le=LIFETIME_SECONDS[1], description="Lifetime of the file, in seconds."
    )


class FileDeleted(BaseModel):
    """Confirmation that a file is deleted."""

    id: ObjectId
    object: Literal["file"] = "file"
    deleted: Deleted = True


class DataReport(BaseModel):
    """The data report of a file: numbers of rows and tokens, and of truncated and skipped rows."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "object": "data_report",
                "file": "file-3f2b8c9d0a1e4f5a6b7c8d9e",
                "model": "smollm2-135m",
                "report": {"rows": 410, "tokens": 27114, "supervised_tokens": 5320},
            }
        }
    )
    object: Literal["data_report"] = "data_report"
    file: str = Field(description="ID of the reported file.")
    model: str = Field(description="Base model whose tokenizer and chat template were used.")
    report: dict[str, Any] | None = Field(description="Null until a worker has prepared the file.")


def lifetime_seconds(form: Mapping[str, str]) -> int | None:
    """Return the lifetime in the form fields `expires_after[…]`. Raises RequestValidationError."""
    prefix = "expires_after["
    given = {name.removeprefix(prefix)[:-1]: value for name, value in form.items() if name.startswith(prefix)}
    if not given:
        return None
    try:
        return ExpiresAfter.model_validate(given, strict=False).seconds
    except ValidationError as error:
        problems = [{**problem, "loc": ("body", "expires_after", *problem["loc"])} for problem in error.errors()]
        raise RequestValidationError(problems, body={"expires_after": given}) from error


def file_object(row: File, *, same_content_as: str | None = None) -> FileObject:
    return FileObject(
        id=row.id,
        bytes=row.num_bytes,
        created_at=int(row.created_at),
        filename=row.filename,
        purpose=row.purpose,
        expires_at=None if row.expires_at is None else int(row.expires_at),
        rows=row.num_rows,
        kind=row.kind,
        digest=row.digest,
        same_content_as=same_content_as,
    )
