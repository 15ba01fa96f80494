"""Imports base models to this node, in a child process. Their folders are named by the digest of their files.

A folder `bases_dir/DIGEST` is complete and never changes: it is created by a rename.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from secrets import token_hex

from catalog.disk import is_full
from catalog.error_texts import ErrorText
from catalog.errors import LorryError, OutOfSpace
from catalog.processes import how_it_exited, is_killed
from catalog.registry import base_models
from catalog.storage.manifest import ManifestFile, files_digest
from catalog.tables.storage import BaseModelRow
from catalog.tables.table import Json
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskClaim
from worker.background import child_task
from worker.background.child_task import Abandoned, ChildFailed
from worker.context.context import WorkerContext
from worker.node import scratch_dirs
from worker.process import sandbox
from worker.protocol.errors import DISK_ERROR, OUT_OF_SPACE, described

log = logging.getLogger(__name__)
CHUNK_BYTES = 2**20
DIGEST = re.compile(r"[0-9a-f]{64}")


class ImportRefused(LorryError):
    """A base model can't be imported from its source on this worker."""


def import_base(context: WorkerContext, task: TaskClaim) -> bool:
    """Import a base model. Raises StaleClaim, Unavailable, OutOfSpace."""
    row = base_models.begin_import(context.db, task)
    if row is None:
        return True
    try:
        manifest, description = _import(context, row, child_task.lost_lease(context, task))
        digest = files_digest(manifest)
        base_models.finish_import(context.db, task, digest=digest, manifest=manifest, description=description)
    except ImportRefused as error:
        base_models.fail_import(context.db, task, error=described(error))
    except Abandoned:
        task_queue.release(context.db, task)
    return True


def ensure(context: WorkerContext, name: str, digest: str, *, is_unwanted: Callable[[], bool] = lambda: False) -> Path:
    """Return the folder of a base model. Imports it again if it is missing on this node.

    `is_unwanted` is called several times a second during an import. Raises ImportRefused, NotFound, Unavailable,
    OutOfSpace; Abandoned once it is unwanted or the worker is shutting down.
    """
    folder = context.settings.bases_dir() / digest
    if folder.is_dir():
        return folder
    try:
        is_deleted = child_task.at_each_heartbeat(context, lambda: not base_models.exists(context.db, name))
        row = base_models.get(context.db, name)
        manifest, _ = _import(context, row, lambda: is_unwanted() or is_deleted())
    except ImportRefused as error:
        if error.code == OUT_OF_SPACE:  # not a fault of the base model
            raise OutOfSpace(error.text) from error
        raise
    found = files_digest(manifest)
    if found != digest:
        raise _changed(context.worker_id, row, found=found, expected=digest)
    return folder


def _changed(worker_id: str, row: BaseModelRow, *, found: str, expected: str) -> ImportRefused:
    return ImportRefused(
        "hub_source_changed" if row.kind == "hub" else "local_source_changed",
        worker_id=worker_id,
        name=row.name,
        found=found,
        expected=expected,
        source=row.source,
        quoted_source=shlex.quote(row.source),
    )


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
            then = _then(row)
            raise ImportRefused(
                "import_created_link",
                name=row.name,
                worker_id=context.worker_id,
                links=links[0],
                source=row.source,
                then=then,
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
    try:
        answer = child_task.run(
            context,
            "worker.children.base_importer",
            request,
            work=work,
            box=box,
            stuck=partial(_no_progress, context.worker_id, row),
            is_unwanted=is_unwanted,
        )
    except ChildFailed as error:
        raise _crashed(context.worker_id, row, box, error) from error
    if "error" in answer:
        raise _reported(context.worker_id, row, answer["error"])
    return answer["description"], answer["commit"]


def _then(row: BaseModelRow) -> str:
    """Return how to continue after the cause of a failed import is removed."""
    if row.state == "importing":
        return "Then add the same model again."
    return "If the job or plan has failed, create it again."


def _unreachable(
    worker_id: str, row: BaseModelRow, source: Path | None, error: OSError | RuntimeError
) -> ImportRefused:
    """Return the error for a source that can't be read. source: None: the folders for downloads from the hub can't be
    created."""
    if is_full(error):
        return _full_disk(worker_id, row)
    then = _then(row)
    cause = getattr(error, "strerror", None) or error
    path = getattr(error, "filename", None) or source or ""
    if source is None:
        return ImportRefused(
            "hub_cache_not_writable", worker_id=worker_id, path=str(path), name=row.name, cause=str(cause), then=then
        )
    return ImportRefused(
        "source_unreadable",
        worker_id=worker_id,
        path=str(path),
        name=row.name,
        cause=str(cause),
        source=str(source),
        then=then,
    )


def _reported(worker_id: str, row: BaseModelRow, error: dict[str, str]) -> ImportRefused:
    """Return the error that the child reported. The worker is named for a problem with its disk."""
    if error["code"] == OUT_OF_SPACE:
        return _full_disk(worker_id, row)
    text = ErrorText(**error)
    if text.code == DISK_ERROR:
        message = f"{text.message.removesuffix('.')} (worker {worker_id})."
        text = replace(text, message=message, remedy=f"Check that worker's disk. {_then(row)}")
    return ImportRefused(text)


def _full_disk(worker_id: str, row: BaseModelRow) -> ImportRefused:
    then = _then(row) if row.state == "importing" else "Waiting work continues automatically."
    return ImportRefused(
        "hub_import_out_of_space" if row.kind == "hub" else "import_out_of_space", worker_id=worker_id, then=then
    )


def _no_progress(worker_id: str, row: BaseModelRow, why: str) -> LorryError:
    """Return the error of an import that was stopped because of `why`."""
    then = _then(row)
    if row.kind == "hub":
        return ImportRefused("hub_import_no_progress", name=row.name, worker_id=worker_id, why=why, then=then)
    return ImportRefused(
        "local_import_no_progress", name=row.name, worker_id=worker_id, why=why, source=row.source, then=then
    )


def _crashed(worker_id: str, row: BaseModelRow, box: sandbox.Sandbox, error: ChildFailed) -> ImportRefused:
    """Return the error for a child that exited without a result. box: its sandbox."""
    if error.is_disk_full:
        return _full_disk(worker_id, row)
    if error.returncode == -signal.SIGXCPU:
        return _out_of_time(worker_id, row, box.limits["cpu"])
    exited, then = how_it_exited(error.returncode), _then(row)
    if is_killed(error.returncode):
        return ImportRefused("import_killed", name=row.name, worker_id=worker_id, exited=exited, then=then)
    return ImportRefused(
        "hub_import_failed" if row.kind == "hub" else "local_import_failed",
        name=row.name,
        worker_id=worker_id,
        exited=exited,
        last_line=error.last_line,
        source=row.source,
        then=then,
    )


def _out_of_time(worker_id: str, row: BaseModelRow, cpu_seconds: int) -> ImportRefused:
    then = _then(row)
    return ImportRefused(
        "hub_import_limit" if row.kind == "hub" else "local_import_limit",
        name=row.name,
        worker_id=worker_id,
        cpu_seconds=cpu_seconds,
        source=row.source,
        then=then,
    )


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
