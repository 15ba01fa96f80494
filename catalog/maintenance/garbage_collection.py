"""Deletes stored objects that the database no longer refers to, once they are old enough.

Runs periodically in any process. Objects that are being stored at the same time are young, and therefore safe.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, delete, exists, func, or_, select, update
from sqlalchemy.orm import Session

from catalog.batches import execution
from catalog.db.database import Database, read_clock, serialize, skip_locked
from catalog.history import job_logs
from catalog.registry import checkpoints
from catalog.storage import files, multipart_uploads, token_cache
from catalog.storage.manifest import hide_unused, unused_artifacts
from catalog.storage.store import GRACE_SECONDS, ArtifactStore
from catalog.tables.history import Checkpoint, JobOutput
from catalog.tables.jobs import FileOverlap, Job, Plan
from catalog.tables.storage import Artifact, File, Prepared, UploadPart
from catalog.tables.tasks import Task
from catalog.tasks.task_queue import TaskKind
from catalog.usage import ledger

EXPIRED_AT_ONCE = 10_000
"""Maximum number of expired files that one run deletes. The next run deletes the rest, which are already hidden."""
CHECKPOINT_SECONDS = 7 * 24 * 3600.0
"""How long the last checkpoints of a job are kept after it has finished."""


def clean(db: Database, store: ArtifactStore, *, grace_seconds: float = GRACE_SECONDS) -> int:
    """Delete unreferenced blobs and manifests. Returns their number. Raises Unavailable, OutOfSpace."""
    drop_references(db)
    ledger.reconcile(db)
    return store.delete_unreferenced(live_digests(db), grace_seconds=grace_seconds)


def drop_references(db: Database) -> None:
    """Remove references to objects that are no longer needed, so that `clean` can delete them.

    These are expired files, parts of finished uploads, checkpoints of jobs that finished a week ago, logs of jobs that
    finished a month ago, token caches of deleted files, expired plans, deleted adapters and results of ended batches.
    """
    with db.write() as session:
        serialize(session, "clean")  # two concurrent runs would lock the same rows in different orders
        now = read_clock(session)
        _expire_files(session, now=now)
        multipart_uploads.forget(session, now=now)
        job_logs.delete_old(session, now=now)
        _drop_checkpoints(session, now=now)
        checkpoints.expire(session)
        session.execute(delete(Plan).where(Plan.expires_at <= now))
        is_of_a_plan = Task.subject.in_(select(Plan.id))
        session.execute(delete(Task).where(Task.kind == TaskKind.PLAN, ~is_of_a_plan))
        _drop_prepared(session, now=now)
        existing = select(Prepared.key)
        is_dangling = or_(FileOverlap.train_key.not_in(existing), FileOverlap.valid_key.not_in(existing))
        session.execute(delete(FileOverlap).where(is_dangling))
    while execution.delete_results(db):
        pass
    with db.read() as session:
        unused = unused_artifacts(session)
    for digest in unused:
        with db.write() as session:
            hide_unused(session, digest)


def live_digests(db: Database) -> set[str]:
    """Return the digests of all objects in use: visible manifests and their files, and `wanted_files`."""
    with db.read() as session:
        artifacts = session.execute(select(Artifact.digest, Artifact.files)).all()
        files_of_artifacts = {file["digest"] for artifact in artifacts for file in artifact.files}
        return {*(artifact.digest for artifact in artifacts), *files_of_artifacts, *wanted_files(session)}


def wanted_files(session: Session) -> set[str]:
    """Return the digests of files in use, of trainer logs and of upload parts.

    A file is in use if it is not deleted or an unfinished job needs it.
    """
    wanted = session.scalars(select(File.digest).where(_is_wanted()))
    printed = session.scalars(select(JobOutput.digest))
    return {*wanted, *printed, *session.scalars(select(UploadPart.digest))}


def _expire_files(session: Session, *, now: float) -> None:
    """Mark expired files as deleted.

    Skips files that a submission has locked, and files that a job has started to use before they were locked here.
    """
    past = select(File.id).where(File.deleted_at.is_(None), File.expires_at <= now, ~files.is_read())
    locked = list(session.scalars(skip_locked(past.order_by(File.expires_at).limit(EXPIRED_AT_ONCE))))
    gone = update(File).where(File.id.in_(locked), ~files.is_read()).values(deleted_at=now)
    gone = gone.returning(File.project_id, File.num_bytes)
    for row in session.execute(gone, execution_options={"synchronize_session": False}):
        ledger.store(session, row.project_id, -row.num_bytes, now=now)


def _drop_checkpoints(session: Session, *, now: float) -> None:
    """Drop the checkpoints of jobs that finished more than CHECKPOINT_SECONDS ago: no attempt resumes from them."""
    ended = select(Job.id).where(Job.finished_at < now - CHECKPOINT_SECONDS)
    kept = (Checkpoint.artifact.is_not(None), Checkpoint.job_id.in_(ended))
    stored = select(Job.project_id, func.sum(Artifact.num_bytes)).select_from(Checkpoint)
    stored = stored.join(Job, Job.id == Checkpoint.job_id).join(Artifact, Artifact.digest == Checkpoint.artifact)
    for project_id, num_bytes in session.execute(stored.where(*kept).group_by(Job.project_id)):
        ledger.store(session, project_id, -int(num_bytes), now=now)
    dropped = update(Checkpoint).where(*kept).values(artifact=None)
    session.execute(dropped, execution_options={"synchronize_session": False})


def _drop_prepared(session: Session, *, now: float) -> None:
    """Drop the preparation results of deleted files, unless an unfinished job or plan needs them."""
    of_file = (File.project_id == Prepared.project_id, File.digest == Prepared.file_digest)
    is_of_file = exists().where(*of_file, _is_wanted())
    gone = delete(Prepared).where(~is_of_file, ~token_cache.is_needed())
    gone = gone.returning(Prepared.project_id, Prepared.artifact, Prepared.num_bytes)
    for project_id, artifact, num_bytes in session.execute(gone, execution_options={"synchronize_session": False}):
        if artifact is not None:
            ledger.store(session, project_id, -num_bytes, now=now)


def _is_wanted() -> ColumnElement[bool]:
    """Condition for files that are not deleted or that an unfinished job reads."""
    return or_(File.deleted_at.is_(None), files.is_read())
