"""Checks I4: every visible artifact is in the store, and all bytes match its digests.

The store is read directly: manifests/DIGEST.json and blobs/AB/DIGEST, each named by its sha256.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import obstore
from obstore.store import from_url

from qa.chaos.audit.findings import Finding
from qa.chaos.audit.tables import Row, Tables


def damaged(found: Tables, store_url: str) -> Iterator[Finding]:
    objects = _Objects(store_url)
    visible = {row["digest"]: row for row in found["artifacts"]}
    for row in found["artifacts"]:
        for problem in _problems(objects, row):
            yield Finding(invariant="I4", subject=row["digest"], sentence=problem)
    for owner, digest in _references(found):
        if digest not in visible:
            yield Finding(invariant="I4", subject=owner, sentence=f"its artifact {digest} is not visible")
    for file in found["files"]:
        if file["deleted_at"] is None and (why := objects.problem_of_blob(file["digest"], file["num_bytes"])):
            yield Finding(invariant="I4", subject=file["id"], sentence=why)
    for adapter in found["adapters"]:
        if not adapter["verification"].get("passed"):
            yield Finding(invariant="I4", subject=adapter["id"], sentence="PEFT has not verified it")


def _references(found: Tables) -> Iterator[tuple[str, str]]:
    for adapter in found["adapters"]:
        if adapter["deleted_at"] is None:
            yield adapter["id"], adapter["artifact"]
    for checkpoint in found["checkpoints"]:
        for name in ("artifact", "adapter"):
            if checkpoint[name] is not None:
                yield checkpoint["id"], checkpoint[name]
    for cache in found["prepared"]:
        if cache["artifact"] is not None:
            yield cache["key"], cache["artifact"]


class _Objects:
    """The objects of a store. Each blob is read once, because many artifacts share blobs."""

    def __init__(self, store_url: str) -> None:
        plain = os.environ.get("AWS_ALLOW_HTTP", "").lower() == "true"
        options: Any = {} if store_url.startswith("file:") else {"client_options": {"allow_http": plain}}
        self._store = from_url(store_url, **options)
        self._looked_at: dict[str, tuple[str, int] | None] = {}

    def content(self, key: str) -> bytes | None:
        try:
            return bytes(obstore.get(self._store, key).bytes())
        except FileNotFoundError:
            return None

    def problem_of_blob(self, digest: str, num_bytes: int) -> str | None:
        if digest not in self._looked_at:
            content = self.content(f"blobs/{digest[:2]}/{digest}")
            self._looked_at[digest] = None if content is None else (sha256(content).hexdigest(), len(content))
        there = self._looked_at[digest]
        if there is None:
            return f"the blob {digest} is not in the store"
        return None if there == (digest, num_bytes) else f"the blob {digest} has other bytes in the store"


def _problems(objects: _Objects, row: Row) -> Iterator[str]:
    content = objects.content(f"manifests/{row['digest']}.json")
    if content is None:
        yield "its manifest is not in the store"
        return
    if sha256(content).hexdigest() != row["digest"]:
        yield "its manifest has other bytes in the store"
        return
    if json.loads(content) != {"kind": row["kind"], "files": row["files"]}:
        yield "its manifest differs from its row"
    for file in row["files"]:
        if (why := objects.problem_of_blob(file["digest"], file["num_bytes"])) is not None:
            yield f"{file['path']}: {why}"
