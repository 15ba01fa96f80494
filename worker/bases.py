"""Brings base models onto this node: imported by a child process, named by the digest of their files.

A folder `bases_dir/DIGEST` is complete and never changes: it appears by one rename.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from secrets import token_hex

from catalog import bases
from catalog.artifacts.manifest import ManifestFile
from catalog.errors import Conflict, LorryError
from catalog.tables import BaseModelRow, Json
from worker import scratch
from worker.context import WorkerContext
from worker.launch import run_child
from worker.trainer_directory import read_json, write_json

CHUNK_BYTES = 2**20
TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "generation_config.json",
    }
)
"""What decides how a conversation becomes tokens."""


class ImportRefused(LorryError):
    """A base model's source can't be made into a base model here."""


class Abandoned(Exception):
    """The worker is leaving: what it did in the background is left for another."""


def import_next(context: WorkerContext) -> bool:
    """Import one base model that waits for it; False where none does."""
    row = bases.claim_import(context.db, lease_seconds=context.settings.lease_seconds)
    if row is None:
        return False
    try:
        manifest, description = _import(context, row)
        bases.finish_import(
            context.db, row.name, digest=bases.files_digest(manifest), manifest=manifest, description=description
        )
    except (ImportRefused, Conflict) as error:
        refusal = {"code": error.code, "message": error.message, "remedy": error.remedy}
        bases.fail_import(context.db, row.name, error=refusal)
    except Abandoned:
        return False
    return True


def ensure(context: WorkerContext, name: str, digest: str) -> Path:
    """The folder of a base model, imported again where this node lacks it. Raises ImportRefused, NotFound."""
    folder = context.settings.bases_dir() / digest
    if folder.is_dir():
        return folder
    manifest, _ = _import(context, bases.get(context.db, name))
    found = bases.files_digest(manifest)
    if found != digest:
        raise ImportRefused(
            f"The source of the base model {name!r} gives other files than it did at first.",
            code="base_changed",
            remedy=f"Restore the source. Expected digest {digest}, found {found}.",
        )
    return folder


def tokenizer_digest(row: BaseModelRow) -> str:
    """Digest of the files that decide tokens and template; bases that share them share token caches."""
    assert row.manifest is not None, "the base is ready"
    files = [file for file in row.manifest["files"] if file["path"] in TOKENIZER_FILES]
    return bases.files_digest({"files": files})


def _import(context: WorkerContext, row: BaseModelRow) -> tuple[Json, Json]:
    """(manifest, description); the files are in place under their digest afterwards."""
    with scratch.owned(context.settings.bases_dir() / f"tmp-{token_hex(8)}") as work:
        work.mkdir()
        target = work / "base"
        description = _run_import(context, row, work, target)
        files = [_digest_file(target, path) for path in sorted(target.rglob("*")) if path.is_file()]
        manifest: Json = {
            "files": [file.as_row() for file in files],
            "source": row.source,
            "revision": row.revision,
        }
        final = context.settings.bases_dir() / bases.files_digest(manifest)
        if not final.is_dir():
            _rename(target, final)
    return manifest, description


def _run_import(context: WorkerContext, row: BaseModelRow, work: Path, target: Path) -> Json:
    arguments, result = work / "arguments.json", work / "result.json"
    write_json(
        arguments,
        {
            "source": row.source,
            "kind": row.kind,
            "revision": row.revision,
            "target_dir": str(target),
            "result": str(result),
        },
    )
    child = run_child(
        "worker.train_entry", "--import-base", str(arguments), log_path=work / "log.txt", with_hub=row.kind == "hub"
    )
    wait_renewing(
        child,
        context,
        lambda: bases.renew_import(context.db, row.name, lease_seconds=context.settings.lease_seconds),
    )
    if not result.exists():
        raise _crashed(row, child.returncode, work / "log.txt")
    answer = read_json(result)
    if "error" in answer:
        error = answer["error"]
        raise ImportRefused(error["message"], code=error["code"], remedy=error["remedy"])
    return answer["description"]


def wait_renewing(child: subprocess.Popen[bytes], context: WorkerContext, renew: Callable[[], None]) -> None:
    """Wait for a child, renewing a lease at every heartbeat. Raises Abandoned, its child killed, on leaving."""
    renewed_at = time.monotonic()
    while True:
        try:
            child.wait(0.2)
            return
        except subprocess.TimeoutExpired:
            if context.draining:
                child.kill()
                child.wait()
                raise Abandoned from None
        if time.monotonic() - renewed_at >= context.settings.heartbeat_seconds:
            renewed_at = time.monotonic()
            renew()


def _crashed(row: BaseModelRow, returncode: int, log_path: Path) -> ImportRefused:
    lines = [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    return ImportRefused(
        f"The import of {row.name!r} ended with exit status {returncode}: {lines[-1][:500] if lines else 'no output'}",
        code="import_failed",
        remedy="Look at the source; then add the same model again, which retries.",
    )


def _digest_file(root: Path, path: Path) -> ManifestFile:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    name = path.relative_to(root).as_posix()
    return ManifestFile(path=name, digest=digest.hexdigest(), num_bytes=path.stat().st_size)


def _rename(target: Path, final: Path) -> None:
    """Another worker on this node may have been quicker: then its folder, with the same bytes, stays."""
    try:
        target.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        shutil.rmtree(target, ignore_errors=True)
