"""Fencing: each write of a worker first locks the job row of its claim, and fails if the claim is no longer valid.

Transactions that lock several rows take them in one order, to prevent deadlocks: the database heartbeat or a worker,
jobs by id, a job's attempt, an artifact, and then the rows that refer to the artifact.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from catalog.errors import StaleClaim
from catalog.states import JobState
from catalog.tables.jobs import Job


def hold(session: Session, claim_id: str) -> Job:
    """Return the job that `claim_id` holds, locked until the transaction ends. Raises StaleClaim."""
    row = select(Job).where(Job.claim_id == claim_id, Job.state == JobState.RUNNING)
    job = session.scalar(row.with_for_update(of=Job))
    if job is None:
        raise StaleClaim(claim_id)
    return job
