"""Token caches: one per data file, tokenizer and length, whoever asked first."""

from __future__ import annotations

import hashlib

import rfc8785
from sqlalchemy import delete, select

from catalog import artifact_rows
from catalog.artifacts.manifest import Manifest
from catalog.data_spec import DataSpec
from catalog.db import Database, read_clock, upsert
from catalog.tables import Json, Prepared

FORMAT = 1
"""Counts up when preparing the same file would give other tokens."""


def key(file_digest: str, tokenizer_digest: str, max_length: int, data: DataSpec | None = None) -> str:
    """The cache's name: whatever decides the tokens goes into it. (The kind of the rows follows from the file.)"""
    parts: Json = {"format": FORMAT, "file": file_digest, "tokenizer": tokenizer_digest, "max_length": max_length}
    if data is not None and data != DataSpec():
        parts["data"] = data.model_dump()
    return hashlib.sha256(rfc8785.dumps(parts)).hexdigest()


def get(db: Database, key: str) -> Prepared | None:
    with db.read() as session:
        return session.get(Prepared, key)


def put(
    db: Database,
    key: str,
    *,
    file_digest: str,
    artifact: Manifest | None,
    report: Json,
    details: Json | None = None,
) -> Prepared:
    """Record a cache whose files are stored; `artifact` None where the report tells why there is none."""
    with db.write() as session:
        now = read_clock(session)
        digest = artifact_rows.show(session, artifact, now=now) if artifact else None
        row: Json = {"key": key, "file_digest": file_digest, "artifact": digest, "report": report, "created_at": now}
        row["details"] = details
        upsert(session, Prepared, [row])
        return session.get_one(Prepared, key, populate_existing=True)


def forget(db: Database, key: str) -> None:
    """A cache whose files are damaged: whoever needs it next makes it again."""
    with db.write() as session:
        digest = session.scalar(select(Prepared.artifact).where(Prepared.key == key))
        if digest is not None:
            artifact_rows.lock(session, digest)  # before the row that refers to it, as `put` does
        # By its digest: another worker may have put a sound cache there meanwhile.
        session.execute(delete(Prepared).where(Prepared.key == key, Prepared.artifact.is_not_distinct_from(digest)))
        if digest is not None:
            artifact_rows.hide_unused(session, digest)
