"""Exports of adapters: create, wait for, list, cancel, delete and download them."""

from __future__ import annotations

import builtins
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from lorry.errors import BadDownload, LorryError, WaitTimeout
from lorry.models import AdapterExport
from lorry.resources.files import OnBytes
from lorry.resources.resource import Resource, url
from lorry.verification import adapter_folder
from lorry.verification.adapter_folder import FileEntry

Format = Literal["adapter", "merged", "gguf", "gguf-lora"]
Quantization = Literal["f16", "q8_0"]


class AdapterExports(Resource):
    """The project's exports of adapters and checkpoints, by the adapter's id or name."""

    def create(
        self,
        adapter: str,
        format: Format,  # noqa: A002
        *,
        quantization: Quantization | None = None,
        hub_repository: str | None = None,
    ) -> AdapterExport:
        """Make a worker export the adapter. Returns immediately. If the project has an unfinished or succeeded export
        with the same options, it is returned.

        quantization: for `gguf`, by default q8_0. hub_repository: ORG/NAME, to which the worker uploads the files.
        """
        body = {"format": format, "quantization": quantization, "hub_repository": hub_repository}
        return self._post(AdapterExport, *_of(adapter), body=body)

    def get(self, adapter: str, export_id: str) -> AdapterExport:
        return self._get(AdapterExport, *_of(adapter, export_id))

    def list(self, adapter: str) -> Iterator[AdapterExport]:
        """Yield the project's exports of the adapter, newest first."""
        return self._list(AdapterExport, *_of(adapter))

    def cancel(self, adapter: str, export_id: str) -> AdapterExport:
        """Cancel an unfinished export."""
        return self._post(AdapterExport, *_of(adapter, export_id, "cancel"))

    def delete(self, adapter: str, export_id: str) -> None:
        """Delete an export with its files. An upload to the Hub is not deleted."""
        self._delete(*_of(adapter, export_id))

    def wait(
        self,
        adapter: str,
        export_id: str,
        *,
        on_progress: Callable[[AdapterExport], None] | None = None,
        timeout_seconds: float | None = None,
        poll_seconds: float = 1.0,
    ) -> AdapterExport:
        """Wait until the export has succeeded. Raises LorryError with its error if it failed or was cancelled."""
        export = self._poll(
            lambda: self.get(adapter, export_id),
            lambda export: export.is_final,
            on_progress=on_progress,
            timeout_seconds=timeout_seconds,
            poll_seconds=poll_seconds,
            timeout=lambda export: WaitTimeout(
                "export_timeout", export_id=export_id, timeout_seconds=timeout_seconds or 0, state=export.status
            ),
        )
        if export.status != "succeeded":
            raise _failure(export)
        return export

    def pull(self, adapter: str, export_id: str, directory: Path | str, *, on_progress: OnBytes | None = None) -> Path:
        """Download the files of an export to `directory`, which must not exist, be empty, or contain this export.

        Every digest is checked before the folder appears under its name. After an interruption, files that are already
        complete are not downloaded again. Raises BadDownload.
        """
        manifest = self._transport.get(url(*_of(adapter, export_id, "files")))
        contents = adapter_folder.Contents.of(
            name=export_id, manifest=manifest, artifact=str(manifest.get("artifact")), lineage={}
        )
        folder, files = Path(directory).expanduser(), [*contents.files.values()]
        target = folder.absolute()  # "." has no name that a temporary folder could be derived from
        if target.is_dir() and _holds(target, files):
            return folder
        adapter_folder.check_free(target, name=export_id)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{export_id}")
        num_done, num_bytes = 0, sum(file.num_bytes for file in files)
        for file in files:
            path = partial / file.path
            if not _is_complete(path, file):
                self._download(adapter, export_id, file, path, _shifted(on_progress, num_done, num_bytes))
            num_done += file.num_bytes
        if target.is_dir():
            target.rmdir()
        partial.rename(target)
        return folder

    def _download(
        self, adapter: str, export_id: str, file: FileEntry, path: Path, on_progress: Callable[[int], None]
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft, digest, num_read = path.with_name(f"{path.name}.part"), hashlib.sha256(), 0
        path_of_file = url(*_of(adapter, export_id, "files", *file.path.split("/")))
        with self._transport.stream(path_of_file) as response, draft.open("wb") as out:
            for piece in response.iter_bytes():
                num_read += len(piece)
                if num_read > file.num_bytes:
                    break
                out.write(piece)
                digest.update(piece)
                on_progress(num_read)
        if digest.hexdigest() != file.digest or num_read != file.num_bytes:
            draft.unlink()
            raise BadDownload("export_digest_mismatch", path=file.path, export_id=export_id)
        draft.rename(path)


def _of(adapter: str, *rest: str) -> tuple[str, ...]:
    return ("adapters", adapter, "exports", *rest)


def _failure(export: AdapterExport) -> LorryError:
    error = export.error
    if error is None:
        return LorryError("export_ended", export=export.id, state=export.status)
    return LorryError.from_report(code=error.code or "export_failed", message=error.message, remedy=error.remedy)


def _is_complete(path: Path, file: FileEntry) -> bool:
    if not path.is_file() or path.stat().st_size != file.num_bytes:
        return False
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest() == file.digest


def _holds(folder: Path, files: builtins.list[FileEntry]) -> bool:
    """Return whether the folder contains these files."""
    return bool(files) and all(_is_complete(folder / file.path, file) for file in files)


def _shifted(on_progress: OnBytes | None, num_before: int, num_bytes: int) -> Callable[[int], None]:
    """Return a function of the bytes of one file that reports those of all files."""

    def report(num_read: int) -> None:
        if on_progress is not None:
            on_progress(num_before + num_read, num_bytes)

    return report
