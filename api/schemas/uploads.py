"""Schemas of uploads in parts, compatible with the openai client."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

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

    bytes: int = Field(ge=1, description="Size of the whole file.")
    filename: Annotated[str, Field(min_length=1, max_length=1024)]
    mime_type: Annotated[
        str, Field(max_length=255, description="Accepted for compatibility and ignored: the rows determine the format.")
    ]
    purpose: Annotated[str, Field(max_length=64, json_schema_extra={"enum": list(PURPOSES)})]
    expires_after: ExpiresAfter | None = None


class UploadCompletion(Strict):
    """The parts of the file in their order."""

    part_ids: Annotated[list[PartId], Field(min_length=1, max_length=MAX_PARTS)]
    md5: Annotated[str, Field(pattern=r"^[0-9A-Fa-f]{32}$", description="MD5 of the whole file, in hex.")] | None = None


class UploadObject(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": EXAMPLE})

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int = Field(description="Unix time until which parts are accepted.")
    filename: str
    purpose: str
    status: Status
    file: FileObject | None = Field(description="The file, once the upload is completed.")


class UploadPartObject(BaseModel):
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
    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


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
