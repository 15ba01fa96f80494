"""/v1/files: upload, list, download and delete files. Training data is validated line by line."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from fastapi import Query, Request
from starlette.responses import StreamingResponse

from api.auth.authentication import Signed
from api.deps import After, IsRetry, Use
from api.rate_limits.threads import run_route
from api.requests.parameters import FileId
from api.routes import FILE, SIGNED, errors
from api.routing import Router
from api.schemas.files import DataReport, FileDeleted, FileObject, file_object, lifetime_seconds
from api.schemas.pagination import ListPage, page_of
from api.transfers.attachment import READ_BYTES, Download
from api.transfers.file_upload import receive_upload
from catalog.datasets.formats import FORMS
from catalog.jobs import data_reports
from catalog.storage import files

router = Router(prefix="/v1/files", tags=["files"], responses=SIGNED)

UPLOAD_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["purpose", "file"],
                    "additionalProperties": False,
                    "dependentRequired": {
                        "expires_after[anchor]": ["expires_after[seconds]"],
                        "expires_after[seconds]": ["expires_after[anchor]"],
                    },
                    "properties": {
                        "purpose": {"type": "string", "enum": list(files.PURPOSES), "description": "Use of the file."},
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": f"For the purpose {files.DATASET}: JSONL in UTF-8, each line {FORMS}.",
                        },
                        "expires_after[anchor]": {
                            "type": "string",
                            "enum": ["created_at"],
                            "description": "Time from which the seconds count.",
                        },
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": files.LIFETIME_SECONDS[0],
                            "maximum": files.LIFETIME_SECONDS[1],
                            "description": "The file is deleted this many seconds after its upload, once no unfinished "
                            "job uses it. Omitted: it is kept until it is deleted.",
                        },
                    },
                }
            }
        },
    }
}


@router.post("", operation_id="upload_file", responses=errors(413, 507), openapi_extra=UPLOAD_FORM)
async def upload_file(request: Request, use: Use, caller: Signed) -> FileObject:
    """Upload a file. Training data is validated line by line.

    If a line is invalid, the error names its number and nothing is stored. Larger files can be sent in parts with
    `/v1/uploads`. The service limits the size of a file and the stored bytes of a project. Requires the scope
    `files:write`.
    """
    folder = use.settings.data_dir / "spool"
    async with receive_upload(request, folder=folder, max_bytes=use.settings.max_file_bytes) as upload:
        lifetime = lifetime_seconds(upload.fields)
        row = await use.slow_work.run_for(
            request,
            caller.project_id,
            lambda is_abandoned: files.create(
                use.db,
                use.store,
                project_id=caller.project_id,
                purpose=upload.fields["purpose"],
                filename=upload.filename,
                spooled=upload.path,
                num_bytes=upload.num_bytes,
                digest=upload.digest,
                lifetime_seconds=lifetime,
                settings=use.settings,
                is_abandoned=is_abandoned,
            ),
        )
    return file_object(
        row, same_content_as=await run_route(caller.project_id, partial(files.same_content, use.db, row))
    )


@router.get("", operation_id="list_files")
def list_files(
    use: Use,
    caller: Signed,
    *,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000, description="Maximum number of items to return, 1 to 10,000.")] = 100,
    order: Annotated[Literal["asc", "desc"], Query(description="Order by creation time.")] = "desc",
    purpose: Annotated[
        str | None, Query(max_length=64, description="Return only files with this purpose. Omitted: all.")
    ] = None,
) -> ListPage[FileObject]:
    """List the project's files, newest first by default. Requires the scope `files:read`."""
    page = files.list_page(use.db, project_id=caller.project_id, after=after, limit=limit, order=order, purpose=purpose)
    return page_of([file_object(row) for row in page.items], has_more=page.has_more)


@router.get("/{file_id}", operation_id="get_file", responses=errors(404))
def get_file(file_id: FileId, use: Use, caller: Signed) -> FileObject:
    """Return a file's metadata. Requires the scope `files:read`."""
    return file_object(files.get(use.db, project_id=caller.project_id, file_id=file_id))


@router.delete("/{file_id}", operation_id="delete_file", responses=errors(404, 409))
def delete_file(file_id: FileId, use: Use, caller: Signed, is_retry: IsRetry) -> FileDeleted:
    """Delete a file. Returns 409 while an unfinished job uses it. Requires the scope `files:write`."""
    files.delete(use.db, project_id=caller.project_id, file_id=file_id, is_client_retry=is_retry)
    return FileDeleted(id=file_id)


@router.get(
    "/{file_id}/content",
    operation_id="get_file_content",
    response_class=StreamingResponse,
    responses={**FILE, **errors(404)},
)
def get_file_content(file_id: FileId, use: Use, caller: Signed) -> Download:
    """Download the file's bytes as they were uploaded. Requires the scope `files:read`."""
    row = files.get(use.db, project_id=caller.project_id, file_id=file_id)
    return Download(
        use.downloads,
        partial(use.store.open_blob, row.digest, chunk_bytes=READ_BYTES),
        caller=caller,
        record=partial(
            use.read_audit.record,
            "file.downloaded",
            caller=caller,
            object_id=row.id,
            details={"purpose": row.purpose, "bytes": row.num_bytes},
        ),
        filename=row.filename,
        num_bytes=row.num_bytes,
        etag=row.digest,
        sha256=row.digest,
    )


@router.get("/{file_id}/report", operation_id="get_file_report", responses=errors(404))
def get_file_report(
    file_id: FileId,
    use: Use,
    caller: Signed,
    model: Annotated[str, Query(max_length=256, description="Base model name.")],
) -> DataReport:
    """Return the data report of the file for the tokenizer of `model`.

    `report` is null until a job or plan with this file and model was prepared. Requires the scope `files:read`.
    """
    report = data_reports.of_file(use.db, project_id=caller.project_id, file_id=file_id, model=model)
    return DataReport(file=file_id, model=model, report=report)
