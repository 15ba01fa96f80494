"""Schemas of uploaded files, and of uploads in parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from api.schemas import CreatedAt, Deleted, ObjectId
from catalog.datasets.formats import KIND_NAMES
from catalog.spec.model_fields import WITHOUT_NUL, Strict
from catalog.storage.files import LIFETIME_SECONDS, PURPOSES
from catalog.storage.multipart_uploads import MAX_PARTS, Status, UploadView
from catalog.tables.storage import File, UploadPart

EXAMPLE: dict[str, Any] = {
    "id": "upload-7d0c2f51a9b84e63c1d2e3f4",
    "object": "upload",
    "bytes": 134217728,
    "created_at": 1790000000,
    "expires_at": 1790003600,
    "filename": "train.jsonl",
    "purpose": "fine-tune",
    "status": "pending",
    "file": None,
}


PartId = Annotated[str, Field(max_length=64, json_schema_extra=WITHOUT_NUL)]


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


class UploadRequest(Strict):
    """A file that will be sent in parts."""

    bytes: int = Field(ge=1, description="Size of the whole file, in bytes.")
    filename: Annotated[str, Field(min_length=1, max_length=1024, description="Name of the file to create.")]
    mime_type: Annotated[
        str, Field(max_length=255, description="Accepted for compatibility and ignored: the rows determine the format.")
    ]
    purpose: Annotated[
        str,
        Field(max_length=64, description="Use of the file.", json_schema_extra={"enum": list(PURPOSES)}),
    ]
    expires_after: ExpiresAfter | None = Field(
        default=None, description="Expiry of the completed file. Null: it is kept until it is deleted."
    )


class UploadCompletion(Strict):
    """The parts of the file in their order."""

    part_ids: Annotated[
        list[PartId],
        Field(min_length=1, max_length=MAX_PARTS, description="IDs of the parts, in the order of the file."),
    ]
    md5: Annotated[str, Field(pattern=r"^[0-9A-Fa-f]{32}$")] | None = Field(
        default=None, description="MD5 of the whole file, in hex. Null: not checked."
    )


class UploadObject(BaseModel):
    """An upload of a file in parts."""

    model_config = ConfigDict(json_schema_extra={"example": EXAMPLE})

    id: ObjectId
    object: Literal["upload"] = "upload"
    bytes: int = Field(description="Size of the whole file as announced, in bytes.")
    created_at: CreatedAt
    expires_at: int = Field(description="Time until which parts are accepted, in Unix seconds.")
    filename: str = Field(description="Name of the file to create.")
    purpose: str = Field(description="Use of the file: `fine-tune`, `batch` or `user_data`.")
    status: Status = Field(
        description="`pending`: parts are accepted. `completed`: the file exists. `cancelled` or `expired`: the "
        "parts are "
        "deleted."
    )
    file: FileObject | None = Field(description="The file, once the upload is completed.")


class UploadPartObject(BaseModel):
    """A part of an upload."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "part-0b1c2d3e4f5a69788796a5b4",
                "object": "upload.part",
                "created_at": 1790000007,
                "upload_id": EXAMPLE["id"],
            }
        }
    )
    id: ObjectId
    object: Literal["upload.part"] = "upload.part"
    created_at: CreatedAt
    upload_id: str = Field(description="ID of the upload to which it belongs.")


def upload_object(view: UploadView) -> UploadObject:
    row = view.upload
    return UploadObject(
        id=row.id,
        bytes=row.num_bytes,
        created_at=int(row.created_at),
        expires_at=int(row.expires_at),
        filename=row.filename,
        purpose=row.purpose,
        status=view.status,
        file=None if view.file is None else file_object(view.file),
    )


def part_object(row: UploadPart) -> UploadPartObject:
    return UploadPartObject(id=row.id, created_at=int(row.created_at), upload_id=row.upload_id)
