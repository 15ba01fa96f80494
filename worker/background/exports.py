"""Makes exports of adapters in child processes, stores their files, and uploads them to the Hugging Face Hub."""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

from catalog import failpoints
from catalog.disk import full_disk_named
from catalog.errors import LorryError, OutOfSpace, listed
from catalog.exports import commands, formats, model_card
from catalog.exports.commands import ExportClaim, ExportResult, WaitingExport
from catalog.exports.formats import Needs
from catalog.resources.memory import readable
from catalog.tables.table import Json
from catalog.tasks.task_queue import TaskClaim
from worker.background import base_models, child_task
from worker.background.child_task import Abandoned, AttemptFailed, WorkRefused
from worker.context.context import WorkerContext
from worker.node import devices, scratch_dirs
from worker.process import sandbox

log = logging.getLogger(__name__)
REFUSAL_SECONDS = 60.0
"""How long a worker that has refused an export leaves it to others."""
UPLOAD_PAUSES = (10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
"""Waits between attempts to upload the finished files, in seconds."""


def make_export(context: WorkerContext, task: TaskClaim) -> bool:
    """Make an export. Returns False if this worker leaves it to others, because it has too little space or memory.

    Raises StaleClaim, WorkRefused, AttemptFailed, QuotaExceeded, NotFound, Forbidden, DamagedArtifact, Abandoned,
    Unavailable. An attempt during which the disk becomes full counts: no attempt may repeat forever.
    """
    if (scarcity := _scarcity(context, commands.inspect(context.db, task))) is not None:
        context.refused_exports[task.subject] = time.monotonic()
        commands.refuse(context.db, task, scarcity)
        return False
    claim, is_unwanted = commands.begin(context.db, task), child_task.lost_lease(context, task)
    try:
        with full_disk_named(), scratch_dirs.owned(context.scratch_dir() / f"export-{token_hex(8)}") as work:
            work.mkdir(parents=True)
            exported = _Attempt(context=context, claim=claim, work=work, is_unwanted=is_unwanted).run()
    except OutOfSpace as error:
        raise AttemptFailed(error.text) from error
    failpoints.pass_by("before_export_finishes")
    commands.finish(context.db, task, exported)
    return True


def refused(context: WorkerContext) -> list[str]:
    """Return the exports that this worker has refused recently, and leaves to others."""
    since = time.monotonic() - REFUSAL_SECONDS
    context.refused_exports = {each: at for each, at in context.refused_exports.items() if at > since}
    return list(context.refused_exports)


def _scarcity(context: WorkerContext, waiting: WaitingExport) -> ScarceResources | None:
    """Return what this worker lacks for the export, or None."""
    if waiting.needs_converter and context.settings.gguf_converter is None:
        return ScarceResources("converter_missing", worker_id=context.worker_id)
    context.scratch_dir().mkdir(parents=True, exist_ok=True)
    try:
        check_resources(
            waiting.needs,
            worker_id=context.worker_id,
            scratch=context.scratch_dir(),
            store=context.store.objects.folder,
            adapter_bytes=waiting.adapter_bytes,
        )
    except ScarceResources as error:
        if not waiting.was_refused:  # a worker refuses it each minute
            log.warning("Export %s waits for another worker. %s", waiting.export_id, error)
        return error
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Attempt:
    """One attempt at an export, in the folder `work`. Its methods raise WorkRefused, AttemptFailed, OutOfSpace,
    Forbidden and, once the worker exits or the export is unwanted, Abandoned."""

    context: WorkerContext
    claim: ExportClaim
    work: Path
    is_unwanted: Callable[[], bool]

    def run(self) -> ExportResult:
        store, claim = self.context.store, self.claim
        adapter, files = self.work / "adapter", self.work / "files"
        of_adapter = store.get_manifest(claim.adapter_artifact)
        self._check_upload()
        store.fetch(of_adapter, adapter, check=self._check)
        if claim.format == "adapter":
            return ExportResult(manifest=None, verification=None, cost=None, hub_url=self._upload(adapter))
        result = self._write_files(adapter, files)
        self._add_card(files, result)
        failpoints.pass_by("uploading")
        manifest = store.put_folder(files, kind="export", check=self._check)
        hub_url = None if claim.hub_repository is None else self._upload(files)
        return ExportResult(
            manifest=manifest, verification=result["verification"], cost=result["cost"], hub_url=hub_url
        )

    def _check_upload(self) -> None:
        """Find an upload that is not allowed before the work, which may take hours."""
        if self.claim.hub_repository is not None:
            formats.check_hub_repository(self.claim.hub_repository, self.context.settings.named_hub_repositories())
            self._run_uploader(None)

    def _write_files(self, adapter: Path, files: Path) -> Json:
        """Run the child that writes and verifies the files. Returns what it measured."""
        claim = self.claim
        converter = self.context.settings.gguf_converter if claim.format == "gguf" else None
        base_dir = base_models.ensure(
            self.context, claim.base_model, claim.base_digest, is_unwanted=self.is_unwanted
        ).absolute()
        request: Json = {
            "adapter_dir": str(adapter),
            "base_dir": str(base_dir),
            "out_dir": str(files),
            "format": claim.format,
            "quantization": claim.quantization,
            "name": claim.adapter_name,
            "file_stem": file_stem(claim),
            "converter": None if converter is None else str(converter.resolve()),
        }
        box = sandbox.export(self.work, base_dir=base_dir, converter=converter)
        return self._run_child("worker.children.exporter", request, box)

    def _add_card(self, files: Path, result: Json) -> None:
        """Add the model card, unless the lineage record was deleted or can't be read by this version."""
        claim = self.claim
        if claim.lineage is None:
            return
        try:
            card = model_card.render_export(
                claim.lineage,
                format=claim.format,
                gguf_name=f"{file_stem(claim)}.gguf",
                verification=result["verification"],
                cost=result["cost"],
            )
        except (KeyError, TypeError, ValueError) as error:  # pydantic's ValidationError is a ValueError
            log.warning(
                "Export %s gets no model card: its lineage record is of another version (%r).", claim.export_id, error
            )
            return
        (files / model_card.NAME).write_bytes(card)

    def _upload(self, folder: Path) -> str:
        """Upload a folder. Returns the address of the commit. After an interruption only the upload is repeated, a
        limited number of times."""
        for pause in UPLOAD_PAUSES:
            try:
                return str(self._run_uploader(folder)["url"])
            except AttemptFailed as error:
                if error.code != "hub_unreachable":
                    raise
                log.warning("%s The upload is repeated after %.0f s.", error.message, pause)
            self._wait(pause)
        try:
            return str(self._run_uploader(folder)["url"])
        except AttemptFailed as error:
            if error.code != "hub_unreachable":
                raise
            raise WorkRefused(error.text) from error

    def _wait(self, seconds: float) -> None:
        """Wait, and keep the lease. Raises Abandoned."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._check()
            self.context.shutdown.wait(min(child_task.POLL_SECONDS, left))

    def _run_uploader(self, folder: Path | None) -> Json:
        """Upload a folder in a child, which has the hub's token and reads no model. None: create the repository if
        needed, and check that the token may write to it."""
        claim = self.claim
        message = f"Upload {claim.adapter_name} ({claim.format}) with Lorry"
        named = None if folder is None else str(folder)
        request: Json = {"folder": named, "repository": claim.hub_repository, "message": message}
        try:
            box = sandbox.hub_upload(self.work)
        except OSError as error:
            raise AttemptFailed(
                "hub_unreachable",
                worker_id=self.context.worker_id,
                filename=error.filename,
                strerror=str(error.strerror),
            ) from error
        return self._run_child("worker.children.hub_uploader", request, box)

    def _run_child(self, module: str, request: Json, box: sandbox.Sandbox) -> Json:
        """Run a child to its end. Returns its result."""
        return child_task.run(
            self.context,
            module,
            request,
            work=self.work,
            box=box,
            action="The export",
            crash="export_crashed",
            is_unwanted=self.is_unwanted,
        )

    def _check(self) -> None:
        """Raises Abandoned. Called while files are stored, it also renews the lease."""
        if self.context.draining or self.is_unwanted():
            raise Abandoned


def file_stem(claim: ExportClaim) -> str:
    """Return the name of the GGUF file without its suffix: the adapter's name, and the quantization."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", claim.adapter_name).strip(".-")[:120] or "adapter"
    return f"{name}-{claim.quantization or 'lora'}"


class ScarceResources(LorryError):
    """This worker lacks disk space, memory or a program for the export. Another one may have it."""


def check_resources(needs: Needs, *, worker_id: str, scratch: Path, store: Path | None, adapter_bytes: int) -> None:
    """Raises ScarceResources.

    scratch: an existing folder in which the export is written, next to a copy of the adapter. store: the folder of the
    artifact store; None if it is a bucket.
    """
    uses = [("scratch files", scratch, adapter_bytes + needs.scratch_bytes)]
    if store is not None:
        uses.append(("the artifact store", store, needs.stored_bytes))
    by_device: dict[int, list[tuple[str, Path, int]]] = defaultdict(list)
    for use in uses:
        by_device[use[1].stat().st_dev].append(use)
    for on_device in by_device.values():
        needed, free = sum(num_bytes for _, _, num_bytes in on_device), shutil.disk_usage(on_device[0][1]).free
        if free < needed:
            raise _too_little_space(worker_id, [name for name, _, _ in on_device], needed=needed, free=free)
    free = devices.free_host_bytes()
    if free < needs.memory_bytes:
        raise ScarceResources(
            "export_memory", memory_bytes=readable(needs.memory_bytes), worker_id=worker_id, free=readable(free)
        )


def _too_little_space(worker_id: str, uses: list[str], *, needed: int, free: int) -> ScarceResources:
    """The message names no path, because users of any project may read it."""
    return ScarceResources(
        "export_out_of_space", needed=readable(needed), uses=listed(uses), worker_id=worker_id, free=readable(free)
    )
