"""Which stored bytes are still wanted, by the record; the rest is deleted once it is old enough.

Run it now and then, from any one process. What is being stored meanwhile is young, and so is safe.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, delete, or_, select, update

from catalog import artifact_rows
from catalog.artifacts.store import GRACE_SECONDS, ArtifactStore
from catalog.db import Database, read_clock, serialise
from catalog.states import FINAL_STATES
from catalog.tables import Artifact, Checkpoint, File, Job, Prepared

CHECKPOINT_SECONDS = 7 * 24 * 3600.0
"""The last checkpoints of a job are kept this long after it has ended."""


def sweep(db: Database, store: ArtifactStore, *, grace_seconds: float = GRACE_SECONDS) -> int:
    """Delete blobs and manifests that nothing names. Returns how many. Raises Unavailable, DamagedArtifact."""
    let_go(db)
    return store.delete_unreferenced(live_digests(db), grace_seconds=grace_seconds)


def let_go(db: Database) -> None:
    """Hide what nobody needs: checkpoints of jobs that ended a week ago, tokens of deleted files, deleted adapters."""
    with db.write() as session:
        serialise(session, "sweep")  # two at once would lock the same rows, each in its own order
        ended = select(Job.id).where(Job.finished_at < read_clock(session) - CHECKPOINT_SECONDS)
        kept = update(Checkpoint).where(Checkpoint.artifact.is_not(None), Checkpoint.job_id.in_(ended))
        session.execute(kept.values(artifact=None))
        session.execute(delete(Prepared).where(Prepared.file_digest.not_in(select(File.digest).where(_is_wanted()))))
    with db.read() as session:
        unused = artifact_rows.unused(session)
    for digest in unused:
        with db.write() as session:
            artifact_rows.hide_unused(session, digest)


def live_digests(db: Database) -> set[str]:
    """Manifests that are visible, and files that are not deleted or that a job still needs."""
    with db.read() as session:
        manifests = session.scalars(select(Artifact.digest))
        files = session.scalars(select(File.digest).where(_is_wanted()))
        return {*manifests, *files}


def _is_wanted() -> ColumnElement[bool]:
    """The file is not deleted, or a job that has not ended reads it."""
    ended = [state.value for state in FINAL_STATES]
    reads_it = or_(Job.training_file == File.id, Job.validation_file == File.id)
    return or_(File.deleted_at.is_(None), select(Job.id).where(reads_it, Job.state.not_in(ended)).exists())
