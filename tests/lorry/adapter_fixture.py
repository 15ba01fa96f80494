"""An adapter as the service serves it: files, manifest, lineage and tar."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Mapping
from typing import Any

import rfc8785

from tests.lorry.scripted_server import Reply, Script

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 20_000, "sub/extra.txt": b""}


def manifest(files: Mapping[str, bytes] = FILES) -> dict[str, Any]:
    rows = [
        {"path": path, "digest": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}
        for path, content in sorted(files.items())
    ]
    return {"object": "list", "kind": "adapter", "data": rows, "artifact": digest_of(rows)}


def canonical_sha256(value: Any) -> str:
    return hashlib.sha256(rfc8785.dumps(value)).hexdigest()


def digest_of(rows: list[dict[str, Any]]) -> str:
    return canonical_sha256({"files": rows, "kind": "adapter"})


def lineage(artifact: str) -> dict[str, Any]:
    record = {"outputs": {"artifact": artifact}, "results": {"loss": 1.25e-7}}
    return {"object": "adapter.lineage", "lineage_id": canonical_sha256(record), "lineage": record}


def tar(members: Mapping[str, bytes] = FILES, *extra: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, content in members.items():
            info = tarfile.TarInfo(path)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in extra:
            archive.addfile(info)
    return out.getvalue()


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def serve(service: Script, archive: bytes | Reply, *, listing: dict[str, Any] | None = None, **fields: str) -> None:
    """Serve the adapter `a` with any archive."""
    listing = listing or manifest()
    adapter = {"id": "a", "name": "ft:m:p:s/../x:1", "base_model": "m", "artifact": listing["artifact"]}
    service.on("GET", "/v1/adapters/a", adapter | fields)
    service.on("GET", "/v1/adapters/a/files", listing)
    service.on("GET", "/v1/adapters/a/lineage", lineage(listing["artifact"]))
    service.on("GET", "/v1/adapters/a/archive", archive if isinstance(archive, Reply) else Reply(body=archive))
