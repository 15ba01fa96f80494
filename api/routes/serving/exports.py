"""/v1/adapters/{adapter}/exports: exports of an adapter in the formats of serving engines, and their files."""

from __future__ import annotations

from functools import partial

from starlette.responses import StreamingResponse

from api.auth.authentication import Signed
from api.deps import After, IsRetry, Limit, Use
from api.requests.parameters import Adapter, ExportId, FilePath
from api.routes import FILE, SIGNED, errors
from api.routing import Router
from api.schemas.adapters import ArtifactFiles, files_object
from api.schemas.pagination import ListPage, page_of
from api.schemas.serving.exports import ExportDeleted, ExportObject, ExportRequest, export_object
from api.transfers.attachment import READ_BYTES, Download
from catalog.errors import LorryError
from catalog.exports import commands
from catalog.storage.manifest import Manifest

router = Router(prefix="/v1/adapters/{adapter}/exports", tags=["adapters"], responses={**SIGNED, **errors(404)})


class ExportFileNotFound(LorryError):
    """The export exists, but has no file with this path."""

    status = 404


@router.post("", operation_id="create_adapter_export", responses=errors(409))
def create_adapter_export(adapter: Adapter, body: ExportRequest, use: Use, caller: Signed) -> ExportObject:
    """Export an adapter or checkpoint of the project, or one that is shared with it, in the format of a serving engine.

    A worker writes the files, reads them back and compares their logits with those of the adapted model. If the project
    has an unfinished or succeeded export with the same options, it is returned. Requires the scope `adapters:write`.
    """
    row = commands.create(
        use.db,
        caller=caller,
        adapter=adapter,
        format=body.format,
        quantization=body.quantization,
        hub_repository=body.hub_repository,
        allowed_repositories=use.settings.named_hub_repositories(),
    )
    use.notifier.wake_workers()
    return export_object(row)


@router.get("", operation_id="list_adapter_exports")
def list_adapter_exports(
    adapter: Adapter, use: Use, caller: Signed, after: After = None, limit: Limit = 20
) -> ListPage[ExportObject]:
    """List the project's exports of an adapter, newest first. Requires the scope `adapters:read`."""
    page = commands.list_page(use.db, project_id=caller.project_id, adapter=adapter, after=after, limit=limit)
    return page_of([export_object(row) for row in page.items], has_more=page.has_more)


@router.get("/{export}", operation_id="get_adapter_export")
def get_adapter_export(adapter: Adapter, export: ExportId, use: Use, caller: Signed) -> ExportObject:
    """Return an export by ID. Requires the scope `adapters:read`."""
    return export_object(commands.get(use.db, project_id=caller.project_id, adapter=adapter, export=export))


@router.post("/{export}/cancel", operation_id="cancel_adapter_export", responses=errors(409))
def cancel_adapter_export(adapter: Adapter, export: ExportId, use: Use, caller: Signed) -> ExportObject:
    """Cancel an unfinished export. Requires the scope `adapters:write`."""
    return export_object(commands.cancel(use.db, project_id=caller.project_id, adapter=adapter, export=export))


@router.delete("/{export}", operation_id="delete_adapter_export")
def delete_adapter_export(
    adapter: Adapter, export: ExportId, use: Use, caller: Signed, is_retry: IsRetry
) -> ExportDeleted:
    """Delete an export in any state, with its files. An upload to the Hub is not deleted.

    Requires the scope `adapters:write`.
    """
    commands.delete(use.db, project_id=caller.project_id, adapter=adapter, export=export, is_client_retry=is_retry)
    return ExportDeleted(id=export)


@router.get("/{export}/files", operation_id="list_adapter_export_files", responses=errors(409))
def list_adapter_export_files(adapter: Adapter, export: ExportId, use: Use, caller: Signed) -> ArtifactFiles:
    """Return the manifest of an export: each file with its size and digest. Requires the scope `adapters:read`."""
    _, artifact = commands.files_of(use.db, project_id=caller.project_id, adapter=adapter, export=export)
    return files_object(artifact)


@router.get(
    "/{export}/files/{path:path}",
    operation_id="get_adapter_export_file",
    response_class=StreamingResponse,
    responses={**FILE, **errors(409)},
)
def get_adapter_export_file(adapter: Adapter, export: ExportId, path: FilePath, use: Use, caller: Signed) -> Download:
    """Download one file of an export. Requires the scope `adapters:read`."""
    row, artifact = commands.files_of(use.db, project_id=caller.project_id, adapter=adapter, export=export)
    manifest = Manifest.from_rows(artifact.kind, artifact.files)
    file = manifest.file(path)
    if file is None:
        names = ", ".join(item.path for item in manifest.files)
        raise ExportFileNotFound("export_file_not_found", export=export, path=path, names=names, param="path")
    details = {"name": row.adapter_name, "export": row.id, "file": path}
    return Download(
        use.downloads,
        partial(use.store.open_blob, file.digest, chunk_bytes=READ_BYTES),
        caller=caller,
        record=partial(
            use.read_audit.record, "adapter.downloaded", caller=caller, object_id=row.adapter_id, details=details
        ),
        filename=path.rpartition("/")[2],
        num_bytes=file.num_bytes,
        etag=file.digest,
        sha256=file.digest,
    )
