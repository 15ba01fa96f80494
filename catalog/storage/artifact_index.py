"""Rows of visible manifests. Readers see an artifact once the transaction of its owner has committed its row."""

from __future__ import annotations

from sqlalchemy import ColumnElement, exists, or_, select
from sqlalchemy.orm import Session

from catalog.db.database import get_once, upsert
from catalog.storage.manifest import Manifest
from catalog.tables.exports import UNFINISHED_EXPORTS, AdapterExport
from catalog.tables.history import Checkpoint
from catalog.tables.storage import Adapter, Artifact, Prepared


def show(session: Session, manifest: Manifest, *, now: float) -> str:
    """Make the manifest visible, unless an equal one is visible already. Returns its digest.

    Its row is locked, so that no other transaction hides it before this one has committed a reference to it.
    """
    files = [{"path": f.path, "digest": f.digest, "num_bytes": f.num_bytes} for f in manifest.files]
    row = {"digest": manifest.digest, "kind": manifest.kind, "files": files, "num_bytes": manifest.num_bytes}
    if get_once(session, Artifact, manifest.digest, lock="share") is None:
        upsert(session, Artifact, [{**row, "created_at": now}])
    return manifest.digest


def lock(session: Session, digest: str) -> Artifact | None:
    """Return the row, locked until the transaction ends, or None if it is hidden."""
    return session.get(Artifact, digest, with_for_update=True)


def hide_unused(session: Session, digest: str) -> bool:
    """Delete the row if no other row refers to it. Garbage collection of the store may then delete its files."""
    session.flush()
    row = lock(session, digest)
    if row is None or session.scalar(select(Artifact.digest).where(Artifact.digest == digest, _is_used())):
        return False
    session.delete(row)
    return True


def unused(session: Session) -> list[str]:
    """Return the digests of visible manifests that no other row refers to."""
    return list(session.scalars(select(Artifact.digest).where(~_is_used()).order_by(Artifact.digest)))


def _is_used() -> ColumnElement[bool]:
    """In a query: a row refers to the artifact. A deleted adapter keeps the digest but does not need the files."""
    of_adapter = exists().where(Adapter.artifact == Artifact.digest, Adapter.deleted_at.is_(None))
    of_checkpoint = exists().where(Checkpoint.adapter == Artifact.digest)
    is_exported = AdapterExport.status.in_(UNFINISHED_EXPORTS)
    return or_(
        of_adapter,
        of_checkpoint,
        exists().where(AdapterExport.adapter_artifact == Artifact.digest, is_exported),
        *(exists().where(owner.artifact == Artifact.digest) for owner in (Checkpoint, Prepared, AdapterExport)),
    )
