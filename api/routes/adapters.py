"""/v1/adapters: trained adapters, their files, and the lineage record that proves their origin."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

from fastapi import Query
from starlette.responses import StreamingResponse

from api.auth.authentication import Signed
from api.deps import After, IsRetry, JobKey, Limit, Services, Use
from api.job_objects import job_objects
from api.requests.idempotency import identity_of_text
from api.requests.parameters import Adapter, FilePath
from api.routes import FILE, SIGNED, binary, errors
from api.routing import Router
from api.schemas.adapters import (
    AdapterDeleted,
    AdapterObject,
    AdapterVerification,
    ArtifactFiles,
    DsseEnvelope,
    LineageObject,
    VerificationObject,
    adapter_object,
    files_object,
)
from api.schemas.jobs import FineTuningJob
from api.schemas.pagination import ListPage, page_of
from api.transfers.attachment import READ_BYTES, ArchiveMember, Download, inline, tar_chunks, tar_size
from catalog.audit import lineage_signatures
from catalog.caller import Caller
from catalog.errors import LorryError
from catalog.jobs import reproduction, submission
from catalog.registry import adapters, lineage
from catalog.registry.adapters import AdapterView
from catalog.storage.manifest import Manifest

router = Router(prefix="/v1/adapters", tags=["adapters"], responses=SIGNED)
Shared = Annotated[
    bool, Query(description="List the adapters that other projects share with this one, instead of its own.")
]
TAR = binary("application/x-tar", "A tar archive, as an attachment.")


class AdapterFileNotFound(LorryError):
    """The adapter exists, but has no file with this path."""

    status = 404


@router.get("", operation_id="list_adapters")
def list_adapters(
    use: Use, caller: Signed, after: After = None, limit: Limit = 20, shared: Shared = False
) -> ListPage[AdapterObject]:
    """List the project's adapters, newest first. Checkpoints are not listed; GET a checkpoint by its name instead.

    Requires the scope `adapters:read`.
    """
    page = adapters.list_page(use.db, project_id=caller.project_id, after=after, limit=limit, shared=shared)
    return page_of([_shown(view) for view in page.items], has_more=page.has_more)


@router.get("/{adapter}", operation_id="get_adapter", responses=errors(404))
def get_adapter(adapter: Adapter, use: Use, caller: Signed) -> AdapterObject:
    """Return an adapter or a checkpoint by ID or name. Requires the scope `adapters:read`."""
    return _shown(adapters.get(use.db, project_id=caller.project_id, name=adapter))


@router.delete("/{adapter}", operation_id="delete_adapter", responses=errors(404, 409))
def delete_adapter(adapter: Adapter, use: Use, caller: Signed, is_retry: IsRetry) -> AdapterDeleted:
    """Delete an adapter, or the weights of a checkpoint by its name. A checkpoint's job is not affected.

    Returns 409 while an unfinished job continues from the adapter. Requires the scope `adapters:write`.
    """
    row = adapters.delete(use.db, project_id=caller.project_id, name=adapter, is_client_retry=is_retry)
    return AdapterDeleted(id=row.id)


@router.get("/{adapter}/files", operation_id="list_adapter_files", responses=errors(404))
def list_adapter_files(adapter: Adapter, use: Use, caller: Signed) -> ArtifactFiles:
    """Return the manifest: each file with its size and digest. Requires the scope `adapters:read`."""
    return files_object(adapters.get(use.db, project_id=caller.project_id, name=adapter).artifact)


@router.get(
    "/{adapter}/files/{path:path}",
    operation_id="get_adapter_file",
    response_class=StreamingResponse,
    responses={**FILE, **errors(404)},
)
def get_adapter_file(adapter: Adapter, path: FilePath, use: Use, caller: Signed) -> Download:
    """Download one file of an adapter or checkpoint. Requires the scope `adapters:read`."""
    view = adapters.get(use.db, project_id=caller.project_id, name=adapter)
    file = _manifest(view).file(path)
    if file is None:
        names = ", ".join(item.path for item in _manifest(view).files)
        raise AdapterFileNotFound("adapter_file_not_found", adapter=adapter, path=path, names=names, param="path")
    return Download(
        use.downloads,
        partial(use.store.open_blob, file.digest, chunk_bytes=READ_BYTES),
        caller=caller,
        record=_record(view, use, caller, file=path),
        filename=path.rpartition("/")[2],
        num_bytes=file.num_bytes,
        etag=file.digest,
        sha256=file.digest,
    )


@router.get(
    "/{adapter}/archive",
    operation_id="get_adapter_archive",
    response_class=StreamingResponse,
    responses={**TAR, **errors(404)},
)
def get_adapter_archive(adapter: Adapter, use: Use, caller: Signed) -> Download:
    """Download all files as one tar archive, with manifest.json and lineage.json. PEFT loads the unpacked folder.

    Requires the scope `adapters:read`.
    """
    view = adapters.get(use.db, project_id=caller.project_id, name=adapter)
    members = _members(view, use)
    made_at = int(view.adapter.created_at)
    return Download(
        use.downloads,
        partial(tar_chunks, members, modified_at=made_at),
        caller=caller,
        record=_record(view, use, caller),
        filename=f"{view.adapter.name.replace(':', '-')}.tar",
        num_bytes=tar_size(members, modified_at=made_at),
        etag=view.adapter.artifact,
        media_type="application/x-tar",
    )


@router.get("/{adapter}/lineage", operation_id="get_adapter_lineage", responses=errors(404))
def get_adapter_lineage(adapter: Adapter, use: Use, caller: Signed) -> LineageObject:
    """Return the signed lineage record: base model, data, configuration, attempts, code and results.

    The record is sufficient to run the job again. Requires the scope `adapters:read`.
    """
    view = adapters.get(use.db, project_id=caller.project_id, name=adapter)
    children = adapters.children(use.db, project_id=caller.project_id, name=view.adapter.id)
    return _lineage(view, use).model_copy(update={"children": [child.name for child in children]})


@router.post("/{adapter}/verify", operation_id="verify_adapter", responses=errors(404))
async def verify_adapter(adapter: Adapter, use: Use, caller: Signed) -> AdapterVerification:
    """Verify an adapter or checkpoint: its stored bytes against the manifest, and its lineage record against its ID and
    the files.

    Reads every stored byte, so it can take seconds. Requires the scope `adapters:read`.
    """
    return await use.slow_work.run(caller.project_id, partial(_verified, use, caller.project_id, adapter))


@router.post("/{adapter}/reproduce", operation_id="reproduce_adapter", responses=errors(404, 409))
def reproduce_adapter(
    adapter: Adapter, use: Use, caller: Signed, idempotency_key: JobKey = None, *, is_retry: IsRetry
) -> FineTuningJob:
    """Create a job that trains the adapter again from its lineage record, and compares the digests.

    `reproduces` of the job contains the recorded digests, and the verdict once the job has succeeded. The base model
    and the data files are found by digest. Returns 409 with a list of all inputs that are missing. The quotas of jobs
    apply. Requires the scope `jobs:write`.
    """
    identity = identity_of_text(f"reproduce {adapter}", idempotency_key=idempotency_key, is_client_retry=is_retry)
    job = submission.made_before(use.db, caller=caller, **identity)
    if job is None:
        prepared = reproduction.prepare(use.db, caller, adapter)
        job = submission.create(use.db, caller=caller, request=prepared, **identity)
    use.notifier.wake_workers()
    return job_objects(use.db, [job], caller=caller)[0]


def _verified(use: Services, project_id: str, adapter: str) -> AdapterVerification:
    view = adapters.get(use.db, project_id=project_id, name=adapter)
    manifest = _manifest(view)
    problems = use.store.verify(manifest)
    if manifest.digest != view.adapter.artifact:
        problems.append("The manifest does not match the digest in the adapter's record.")
    problems += lineage.verify(view.adapter.lineage, view.adapter.lineage_id, manifest)
    return AdapterVerification(
        adapter_id=view.adapter.id,
        passed=not problems,
        problems=problems,
        verification=VerificationObject.model_validate(view.adapter.verification),
    )


def _record(view: AdapterView, use: Services, caller: Caller, *, file: str | None = None) -> Callable[[], None]:
    """Return a function that records the download in the audit log. `file` None: the archive of all files."""
    details = {"name": view.adapter.name, **({"file": file} if file else {})}
    return partial(
        use.read_audit.record, "adapter.downloaded", caller=caller, object_id=view.adapter.id, details=details
    )


def _shown(view: AdapterView) -> AdapterObject:
    return adapter_object(view.adapter, num_bytes=view.artifact.num_bytes, rank=view.rank, cost=view.cost)


def _manifest(view: AdapterView) -> Manifest:
    return Manifest.from_rows(view.artifact.kind, view.artifact.files)


def _lineage(view: AdapterView, use: Services) -> LineageObject:
    row, manifest = view.adapter, _manifest(view)
    signature = None
    if manifest.digest == row.artifact and not lineage.verify(row.lineage, row.lineage_id, manifest):
        signature = DsseEnvelope.model_validate(
            lineage_signatures.sign_lineage(lineage_id=row.lineage_id, artifact=row.artifact, pepper=use.pepper.current)
        )
    return LineageObject(adapter_id=row.id, lineage_id=row.lineage_id, lineage=row.lineage, signature=signature)


def _members(view: AdapterView, use: Services) -> list[ArchiveMember]:
    """Return the members of the archive. The manifest lists neither lineage.json nor manifest.json, so a file of the
    adapter with one of these names takes precedence."""
    manifest = _manifest(view)
    members = [
        ArchiveMember(
            path=file.path,
            num_bytes=file.num_bytes,
            read=partial(use.store.open_blob, file.digest, chunk_bytes=READ_BYTES),
        )
        for file in manifest.files
    ]
    records = {
        "lineage.json": _lineage(view, use).model_dump_json(indent=2, exclude={"children"}).encode(),
        "manifest.json": manifest.canonical(),
    }
    return members + [inline(path, content) for path, content in records.items() if manifest.file(path) is None]
