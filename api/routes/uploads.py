"""/v1/uploads: files that are uploaded in parts of at most 64 MiB."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import Request

from api.auth.authentication import Signed
from api.deps import IsRetry, Use
from api.rate_limits.threads import run_route
from api.requests.parameters import UploadId
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.files import (
    UploadCompletion,
    UploadObject,
    UploadPartObject,
    UploadRequest,
    part_object,
    upload_object,
)
from api.transfers.file_upload import receive_upload
from api.transfers.multipart_form import PART
from catalog.storage import multipart_uploads
from catalog.storage.store import Blob

router = Router(prefix="/v1/uploads", tags=["files"], responses=SIGNED)

PART_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "additionalProperties": False,
                    "properties": {
                        "data": {
                            "type": "string",
                            "format": "binary",
                            "description": "The bytes of the part, at most 64 MiB.",
                        }
                    },
                }
            }
        },
    }
}


@router.post("", operation_id="create_upload", responses=errors(413))
def create_upload(body: UploadRequest, use: Use, caller: Signed) -> UploadObject:
    """Create an upload for a file that is sent in parts. It expires after one hour; parts of an incomplete one are
    deleted.

    Each part has at most 64 MiB. Requires the scope `files:write`.
    """
    view = multipart_uploads.create(
        use.db,
        project_id=caller.project_id,
        purpose=body.purpose,
        filename=body.filename,
        num_bytes=body.bytes,
        lifetime_seconds=body.expires_after.seconds if body.expires_after else None,
        settings=use.settings,
    )
    return upload_object(view)


@router.post(
    "/{upload_id}/parts",
    operation_id="add_upload_part",
    responses=errors(404, 409, 413, 507),
    openapi_extra=PART_FORM,
)
async def add_upload_part(upload_id: UploadId, request: Request, use: Use, caller: Signed) -> UploadPartObject:
    """Add a part of at most 64 MiB, in any order. Identical bytes sent twice are one part.

    Requires the scope `files:write`.
    """
    check = partial(multipart_uploads.check_open, use.db, project_id=caller.project_id, upload_id=upload_id)
    await run_route(caller.project_id, check)  # rejects a closed upload before the bytes of the part are read
    folder = use.settings.data_dir / "spool"
    async with receive_upload(request, folder=folder, max_bytes=multipart_uploads.MAX_PART_BYTES, shape=PART) as part:
        row = await use.slow_work.run(
            caller.project_id,
            partial(
                multipart_uploads.add_part,
                use.db,
                use.store,
                project_id=caller.project_id,
                upload_id=upload_id,
                spooled=part.path,
                content=Blob(digest=part.digest, num_bytes=part.num_bytes),
                settings=use.settings,
            ),
        )
    return part_object(row)


@router.post("/{upload_id}/complete", operation_id="complete_upload", responses=errors(404, 409, 413, 507))
async def complete_upload(
    upload_id: UploadId, body: UploadCompletion, *, request: Request, use: Use, caller: Signed, is_retry: IsRetry
) -> UploadObject:
    """Create the file from its parts, in the order of `part_ids`. Training data is validated line by line.

    If the file is rejected, the upload stays open; an upload can be completed up to 10 times. Requires the scope
    `files:write`.
    """
    view = await use.slow_work.run_for(
        request,
        caller.project_id,
        lambda is_abandoned: multipart_uploads.complete(
            use.db,
            use.store,
            project_id=caller.project_id,
            upload_id=upload_id,
            part_ids=body.part_ids,
            md5=body.md5,
            folder=use.settings.data_dir / "spool",
            settings=use.settings,
            is_client_retry=is_retry,
            is_abandoned=is_abandoned,
        ),
    )
    return upload_object(view)


@router.post("/{upload_id}/cancel", operation_id="cancel_upload", responses=errors(404, 409))
def cancel_upload(upload_id: UploadId, use: Use, caller: Signed, is_retry: IsRetry) -> UploadObject:
    """Cancel an upload and delete its parts. Requires the scope `files:write`."""
    view = multipart_uploads.cancel(use.db, project_id=caller.project_id, upload_id=upload_id, is_client_retry=is_retry)
    return upload_object(view)
