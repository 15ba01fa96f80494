"""Counts a project's stored bytes from the rows that own them.

The counters in the table `stored_bytes` follow every change (`ledger.store`). Garbage collection compares them with
this recount: a counter that missed a change would stay wrong otherwise, and quotas depend on it.
"""

from __future__ import annotations

import logging

from sqlalchemy import Select, func, select, union_all
from sqlalchemy.orm import Session

from catalog.db.database import Database, add_if_missing, read_clock
from catalog.tables.exports import AdapterExport
from catalog.tables.history import Checkpoint, JobOutput
from catalog.tables.jobs import Job
from catalog.tables.storage import Adapter, Artifact, File, Prepared
from catalog.tables.usage import StoredBytes
from catalog.usage import ledger

log = logging.getLogger("lorry.catalog")


def recount(session: Session, project_id: str | None = None) -> dict[str, int]:
    """Return stored bytes by project, for all projects or one. A project that stores nothing may be missing.

    An object counts once for each row that refers to it, although the store keeps equal bytes only once.
    """
    parts = union_all(*_parts()).subquery()
    total = select(parts.c.project_id, func.sum(parts.c.num_bytes)).group_by(parts.c.project_id)
    if project_id is not None:
        total = total.where(parts.c.project_id == project_id)
    return {owner: int(num_bytes) for owner, num_bytes in session.execute(total)}


def reconcile(db: Database) -> int:
    """Correct the counters that differ from the recount. Returns how many were corrected."""
    with db.read() as session:
        counted = recount(session)
        kept = {row.project_id: row.num_bytes for row in session.scalars(select(StoredBytes))}
    differing = [owner for owner in sorted(counted | kept) if counted.get(owner, 0) != kept.get(owner, 0)]
    return sum(_correct(db, project_id) for project_id in differing)


def _correct(db: Database, project_id: str) -> bool:
    """Recount and correct one project. Returns whether its counter differed.

    The counter is locked first. The recount includes what other transactions committed before, and they add what they
    commit later.
    """
    with db.write() as session:
        add_if_missing(session, StoredBytes, {"project_id": project_id, "num_bytes": 0})
        counter = session.get_one(StoredBytes, project_id, with_for_update=True, populate_existing=True)
        difference = recount(session, project_id).get(project_id, 0) - counter.num_bytes
        ledger.store(session, project_id, difference, now=read_clock(session))
    if difference:
        log.warning("corrected stored bytes project=%s by=%d", project_id, difference)
    return difference != 0


def _parts() -> tuple[Select[str, int], ...]:
    """Select the stored bytes: files, adapters, token caches, checkpoints, adapters of checkpoints, trainer logs,
    exports."""
    adapters = select(Adapter.project_id, Artifact.num_bytes).join(Artifact, Artifact.digest == Adapter.artifact)
    checkpoints = select(Job.project_id, Artifact.num_bytes).select_from(Checkpoint)
    checkpoints = checkpoints.join(Job, Job.id == Checkpoint.job_id)
    return (
        select(File.project_id, File.num_bytes).where(File.deleted_at.is_(None)),
        adapters.where(Adapter.deleted_at.is_(None)),
        select(Prepared.project_id, Prepared.num_bytes).where(Prepared.artifact.is_not(None)),
        checkpoints.join(Artifact, Artifact.digest == Checkpoint.artifact),
        checkpoints.join(Artifact, Artifact.digest == Checkpoint.adapter),
        select(Job.project_id, JobOutput.num_bytes).join(JobOutput, JobOutput.job_id == Job.id),
        select(AdapterExport.project_id, AdapterExport.num_bytes),
    )
