"""The fence: a worker's write begins by locking the job row that its claim still holds, or it does not begin.

Whoever locks several rows takes them in one order, so that nobody waits in a circle: the beat or a worker, jobs by
id, a job's attempt, an artifact, and then what refers to the artifact.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from catalog.errors import StaleClaim
from catalog.states import JobState
from catalog.tables.jobs import Job


def hold(session: Session, claim_id: str, *, state: JobState = JobState.RUNNING) -> Job:
    """The job that `claim_id` holds in `state`, locked until the transaction ends. Raises StaleClaim."""
    mine = select(Job).where(Job.claim_id == claim_id, Job.state == state)
    job = session.scalar(mine.with_for_update(of=Job))
    if job is None:
        raise StaleClaim(claim_id)
    return job
