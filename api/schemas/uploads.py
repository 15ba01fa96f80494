"""Schemas of uploads in parts, compatible with the openai client."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas import CreatedAt, ObjectId
from api.schemas.files import ExpiresAfter, FileObject, file_object
from catalog.spec.strict import WITHOUT_NUL, Strict
from catalog.storage.files import PURPOSES
from catalog.storage.multipart_uploads import MAX_PARTS, Status, UploadView
from catalog.tables.storage import UploadPart

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
