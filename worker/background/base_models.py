"""Imports base models to this node, in a child process. Their folders are named by the digest of their files.

A folder `bases_dir/DIGEST` is complete and never changes: it is created by a rename.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from secrets import token_hex

from catalog.disk import is_full
from catalog.errors import LorryError, OutOfSpace
from catalog.registry import base_models
from catalog.storage.manifest import ManifestFile, files_digest
from catalog.tables.storage import BaseModelRow
from catalog.tables.table import Json
from catalog.tasks.task_queue import TaskClaim
from worker.background import child_task
from worker.background.child_task import Abandoned, AttemptFailed, WorkRefused
from worker.context.context import WorkerContext
from worker.node import scratch_dirs
from worker.process import sandbox

log = logging.getLogger(__name__)
CHUNK_BYTES = 2**20
DIGEST = re.compile(r"[0-9a-f]{64}")


def import_base(context: WorkerContext, task: TaskClaim) -> bool:
    """Import a base model. Raises StaleClaim and the errors of `ensure`."""
    row = base_models.inspect_import(context.db, task)
    manifest, description = _import(context, row, child_task.lost_lease(context, task))
    digest = files_digest(manifest)
    base_models.finish_import(context.db, task, digest=digest, manifest=manifest, description=description)
    return True


def ensure(context: WorkerContext, name: str, digest: str, *, is_unwanted: Callable[[], bool] = lambda: False) -> Path:
    """Return the folder of a base model. Imports it again if it is missing on this node.

    `is_unwanted` is called several times a second during an import. Raises AttemptFailed, because another node may be
    able to import it, NotFound, Unavailable, OutOfSpace; Abandoned once it is unwanted or the worker is shutting down.
    """
    folder = context.settings.bases_dir() / digest
    if folder.is_dir():
        return folder
    is_deleted = child_task.at_each_heartbeat(context, lambda: not base_models.exists(context.db, name))
    row = base_models.get(context.db, name)
    try:
        manifest, _ = _import(context, row, lambda: is_unwanted() or is_deleted())
    except WorkRefused as error:
        raise AttemptFailed(error.text) from error
    found = files_digest(manifest)
    if found != digest:
        raise AttemptFailed(
            "hub_source_changed" if row.kind == "hub" else "local_source_changed",
            worker_id=context.worker_id,
            name=row.name,
            found=found,
            expected=digest,
            source=row.source,
            quoted_source=shlex.quote(row.source),
        )
    return folder


def clean(context: WorkerContext) -> list[str]:
    """Remove the folders of base models that were deleted. Returns their digests. If one is needed later, it is
    imported again."""
    folders = {path.name: path for path in context.settings.bases_dir().iterdir() if DIGEST.fullmatch(path.name)}
    deleted_digests = sorted(base_models.deleted(context.db, folders.keys()))
    removed = [digest for digest in deleted_digests if _remove(context, folders[digest])]
    for digest in removed:
        log.info("The files of a deleted base model were removed: %s.", digest)
    return removed


def _remove(context: WorkerContext, folder: Path) -> bool:
    """Delete a base model's folder. Returns False if the base model is needed again, and the folder stays.

    The folder is renamed before the last look at the database: an import that begins later finds no folder, so it does
    not rely on this one.
    """
    is_deleted = False
    try:
        with scratch_dirs.owned(folder.with_name(f"tmp-{token_hex(8)}")) as aside:
            folder.rename(aside)
            try:
                is_deleted = bool(base_models.deleted(context.db, [folder.name]))
            finally:
                if not is_deleted:
                    _rename(aside, folder)
    except OSError:  # another worker on this node has removed it, or the disk is read-only
        return False
    return is_deleted


def _import(context: WorkerContext, row: BaseModelRow, is_unwanted: Callable[[], bool]) -> tuple[Json, Json]:
    """Import a base model into the folder with its digest. Returns (manifest, description)."""

    def check() -> None:
        if context.draining or is_unwanted():
            raise Abandoned

    with scratch_dirs.owned(context.settings.bases_dir() / f"tmp-{token_hex(8)}") as work:
        work.mkdir()
        target = work / "base"
        request: Json = {
            "source": row.source,
            "kind": row.kind,
            "revision": (row.manifest or {}).get("revision") or row.revision,  # the commit of the first import
            "chat_template": row.chat_template,
            "target_dir": str(target),
        }
        description, commit = _run_child(context, row, work, request, is_unwanted)
        if links := [path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_symlink()]:
            raise WorkRefused(
                "import_created_link", name=row.name, worker_id=context.worker_id, links=links[0], source=row.source
            )
        files = [_digest_file(target, path, check=check) for path in sorted(target.rglob("*")) if path.is_file()]
        manifest: Json = {
            "files": [file.as_row() for file in files],
            "source": row.source,
            "revision": commit or row.revision,
        }
        final = context.settings.bases_dir() / files_digest(manifest)
        if not final.is_dir():
            _rename(target, final)
    return manifest, description


def _run_child(
    context: WorkerContext,
    row: BaseModelRow,
    work: Path,
    request: Json,
    is_unwanted: Callable[[], bool],
) -> tuple[Json, str | None]:
    """Run the child that imports a base model. Returns (description, commit of the hub)."""
    source = None if row.kind == "hub" else Path(row.source)
    try:
        box = sandbox.base_import(work, source=source)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise _unreachable(context.worker_id, row, source, error) from error
    answer = child_task.run(
        context,
        "worker.children.base_importer",
        request,
        work=work,
        box=box,
        action=f"The import of base model {row.name!r}",
        crash="hub_import_crashed" if source is None else "local_import_crashed",
        source=row.source,
        is_unwanted=is_unwanted,
    )
    return answer["description"], answer["commit"]


def _unreachable(worker_id: str, row: BaseModelRow, source: Path | None, error: OSError | RuntimeError) -> LorryError:
    """Return the error for a source that can't be read. source: None: the folders for downloads from the hub can't be
    created."""
    if is_full(error):
        return OutOfSpace("disk_full_on_worker", worker_id=worker_id)
    cause = str(getattr(error, "strerror", None) or error)
    path = str(getattr(error, "filename", None) or source or "")
    about = {"worker_id": worker_id, "path": path, "name": row.name, "cause": cause}
    if source is None:
        return AttemptFailed("hub_cache_not_writable", **about)
    return WorkRefused("source_unreadable", **about, source=str(source))


def _digest_file(root: Path, path: Path, *, check: Callable[[], None]) -> ManifestFile:
    """Hash a file. check: called for each chunk, because hashing a large file takes longer than a lease. Raises
    Abandoned."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            check()
    name = path.relative_to(root).as_posix()
    return ManifestFile(path=name, digest=digest.hexdigest(), num_bytes=path.stat().st_size)


def _rename(target: Path, final: Path) -> None:
    """Rename `target` to `final`. If another worker on this node was faster, its folder with the same bytes stays."""
    try:
        target.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        shutil.rmtree(target, ignore_errors=True)
