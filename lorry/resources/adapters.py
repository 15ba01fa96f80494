"""Trained adapters: look, pull, verify, trace."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lorry import archive, folder
from lorry.models import Adapter
from lorry.resources import pages
from lorry.resources.files import OnBytes
from lorry.transport import Transport


class Adapters:
    """Everywhere an adapter's id or its name will do."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self, *, limit: int | None = None) -> Iterator[Adapter]:
        """Newest first."""
        return (Adapter.of(wire) for wire in itertools.islice(pages.follow(self._transport, "adapters"), limit))

    def get(self, name: str) -> Adapter:
        return Adapter.of(self._transport.get(_of(name)))

    def manifest(self, name: str) -> dict[str, Any]:
        """`data`: path, digest and num_bytes of each file; `artifact`: the digest of it all."""
        return self._transport.get(_of(name, "files"))

    def lineage(self, name: str) -> dict[str, Any]:
        """The record of where the adapter comes from, with its id; `children`: names of those that continue it."""
        return self._transport.get(_of(name, "lineage"))

    def verify(self, name: str) -> dict[str, Any]:
        """The service reads every stored byte again and compares: `passed` and `problems`."""
        return self._transport.request("POST", _of(name, "verify"))

    def pull(self, name: str, directory: Path | str, *, on_progress: OnBytes | None = None) -> Path:
        """Downloads the adapter into `directory`, which must not exist, be empty or hold this very adapter.

        Every digest is checked before the folder appears under its name. What PEFT needs lies in it, and
        manifest.json and lineage.json for `lorry.folder.verify_folder`. Raises BadDownload.
        """
        adapter = self.get(name)
        lineage = {key: value for key, value in self.lineage(adapter.id).items() if key != "children"}
        contents = folder.Contents.of(manifest=self.manifest(adapter.id), artifact=adapter.artifact, lineage=lineage)
        target = Path(directory).expanduser()
        if folder.holds(target, contents):
            return target
        folder.check_free(target)
        with self._transport.stream(_of(adapter.id, "archive"), headers={"accept": "application/x-tar"}) as response:
            return archive.unpack(response.iter_bytes(), contents, target, on_progress=on_progress)


def _of(name: str, *rest: str) -> str:
    return "/".join(("adapters", quote(name, safe=""), *rest))
