"""Which manifests are visible: an artifact exists for readers once its row does, in the transaction of its owner."""

from __future__ import annotations

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from catalog.artifacts.manifest import Manifest
from catalog.db import upsert
from catalog.tables import Adapter, Artifact, Checkpoint, Prepared


def show(session: Session, manifest: Manifest, *, now: float) -> str:
    """Make the manifest visible; the same bytes may have been shown before. Returns its digest.

    Its row is locked, so that nobody hides it before this transaction's reference to it can be seen.
    """
    files = [{"path": f.path, "digest": f.digest, "num_bytes": f.num_bytes} for f in manifest.files]
    row = {"digest": manifest.digest, "kind": manifest.kind, "files": files, "num_bytes": manifest.num_bytes}
    if session.get(Artifact, manifest.digest, with_for_update={"read": True}) is None:
        upsert(session, Artifact, [{**row, "created_at": now}])
    return manifest.digest


def hide_unused(session: Session, digest: str) -> bool:
    """Drop the row where nothing refers to it any more: the store's sweep may then delete its files."""
    session.flush()
    row = session.get(Artifact, digest, with_for_update=True)
    used = [exists().where(owner.artifact == digest) for owner in (Checkpoint, Adapter, Prepared)]
    if row is None or any(session.scalar(select(one)) for one in used):
        return False
    session.delete(row)
    return True
