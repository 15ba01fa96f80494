"""Which stored bytes are still wanted, by the record; the rest is deleted once it is old enough.

Run it now and then, from any one process. What is being stored meanwhile is young, and so is safe.
"""

from __future__ import annotations

from sqlalchemy import or_, select

from catalog.artifacts.store import GRACE_SECONDS, ArtifactStore
from catalog.db import Database
from catalog.states import FINAL_STATES
from catalog.tables import Artifact, File, Job


def sweep(db: Database, store: ArtifactStore, *, grace_seconds: float = GRACE_SECONDS) -> int:
    """Delete blobs and manifests that nothing names. Returns how many. Raises Unavailable, DamagedArtifact."""
    return store.delete_unreferenced(live_digests(db), grace_seconds=grace_seconds)


def live_digests(db: Database) -> set[str]:
    """Manifests that are visible, and files that are not deleted or that a job still needs."""
    ended = [state.value for state in FINAL_STATES]
    reads_it = or_(Job.training_file == File.id, Job.validation_file == File.id)
    is_needed = select(Job.id).where(reads_it, Job.state.not_in(ended)).exists()
    with db.read() as session:
        manifests = session.scalars(select(Artifact.digest))
        files = session.scalars(select(File.digest).where(or_(File.deleted_at.is_(None), is_needed)))
        return {*manifests, *files}
