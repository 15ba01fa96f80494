"""Output of trainers: one stored text for each attempt of a job and each process of its trainer, read line by line.

A worker stores the output that users may see (see worker/session/job_logs.py). Only the worker of an attempt writes
the attempt's texts; in a gang, each member writes those of its own processes. A stale worker therefore can't overwrite
the text of another worker.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from catalog.db.database import Database, read_clock, upsert
from catalog.db.pagination import Page, unknown_cursor
from catalog.errors import StaleClaim
from catalog.history.queries import find
from catalog.storage.store import ArtifactStore, Blob
from catalog.tables.history import Attempt, JobOutput
from catalog.tables.jobs import Job
from catalog.usage import ledger

MAX_BYTES = 512 * 2**10
"""Maximum stored output of one process in one attempt."""
KEPT_SECONDS = 30 * 24 * 3600.0
"""Retention time after the job has finished."""
LATE_SECONDS = 60.0
"""Maximum delay between the recorded end of an attempt and the commit that makes it visible."""
CURSOR = re.compile(r"(\d{1,9})-(\d{1,9})-(\d{1,9})", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    attempt: int
    rank: int
    """Process of the trainer that printed the line; 0 if there is only one."""
    number: int
    """Line number in the stored text of that process, from 1."""
    text: str

    @property
    def id(self) -> str:
        return f"{self.attempt}-{self.rank}-{self.number}"


def record(db: Database, claim_id: str, *, worker_id: str, rank: int, content: Blob) -> None:
    """Store the output of a process for the attempt so far.

    worker_id: worker that holds the attempt; in a gang, the leader. Raises StaleClaim if another worker holds it.
    """
    with db.write() as session:
        attempt = session.get(Attempt, claim_id)
        if attempt is None or attempt.worker_id != worker_id:
            raise StaleClaim(claim_id)
        now = read_clock(session)
        before = session.get(JobOutput, (claim_id, rank), with_for_update=True)
        project_id = session.get_one(Job, attempt.job_id).project_id
        ledger.store(session, project_id, content.num_bytes - (before.num_bytes if before else 0), now=now)
        row = {
            "claim_id": claim_id,
            "rank": rank,
            "job_id": attempt.job_id,
            "attempt": attempt.number,
            "digest": content.digest,
            "num_bytes": content.num_bytes,
            "written_at": now,
        }
        upsert(session, JobOutput, [row])


def attempts_of(db: Database, trainer_id: str, *, ended_after: float) -> tuple[list[tuple[Attempt, Job]], float]:
    """Return the trainer's current attempts and those that ended after `ended_after`, oldest first, with their jobs.

    Also returns the database's time. The next call passes it, minus LATE_SECONDS, as `ended_after` and misses nothing.
    """
    asked = select(Attempt, Job).join(Job, Job.id == Attempt.job_id).where(Attempt.trainer_id == trainer_id)
    found: dict[str, tuple[Attempt, Job]] = {}
    with db.read() as session:
        now = read_clock(session)
        for times in (Attempt.ended_at.is_(None), Attempt.ended_at > ended_after):  # each query uses the index
            found |= {attempt.claim_id: (attempt, job) for attempt, job in session.execute(asked.where(times))}
    return sorted(found.values(), key=lambda one: one[0].started_at), now


def lines(
    db: Database,
    store: ArtifactStore,
    *,
    project_id: str,
    job_id: str,
    attempt: int | None = None,
    rank: int | None = None,
    contains: str | None = None,
    after: str | None = None,
    limit: int = 100,
) -> Page[Line]:
    """Return a page of lines, ordered by attempt, process and number.

    contains: only lines with this text, ignoring case. after: the id of a line.

    Raises NotFound and InvalidRequest, and Unavailable or DamagedArtifact from the store.
    """
    begun = _place(after)
    with db.read() as session:
        job = find(session, project_id, job_id)
        kept = select(JobOutput).where(JobOutput.job_id == job.id).order_by(JobOutput.attempt, JobOutput.rank)
        texts = [
            text
            for text in session.scalars(kept)
            if attempt in (None, text.attempt) and rank in (None, text.rank) and (text.attempt, text.rank) >= begun[:2]
        ]
    found: list[Line] = []
    for line in _lines(store, texts):
        is_wanted = contains is None or contains.lower() in line.text.lower()
        if is_wanted and (line.attempt, line.rank, line.number) > begun:
            found.append(line)
        if len(found) > limit:
            break
    return Page(items=found[:limit], has_more=len(found) > limit)


def delete_old(session: Session, *, now: float) -> None:
    """Delete the output of jobs that finished long ago. The store's garbage collection then deletes the texts."""
    ended = select(Job.id).where(Job.finished_at < now - KEPT_SECONDS)
    stored = select(Job.project_id, func.sum(JobOutput.num_bytes)).join(Job, Job.id == JobOutput.job_id)
    for project_id, num_bytes in session.execute(stored.where(Job.id.in_(ended)).group_by(Job.project_id)):
        ledger.store(session, project_id, -int(num_bytes), now=now)
    gone = delete(JobOutput).where(JobOutput.job_id.in_(ended))
    session.execute(gone, execution_options={"synchronize_session": False})


def _place(after: str | None) -> tuple[int, int, int]:
    if after is None:
        return (0, 0, 0)
    found = CURSOR.fullmatch(after)
    if found is None:
        raise unknown_cursor(after)
    return int(found[1]), int(found[2]), int(found[3])


def _lines(store: ArtifactStore, texts: list[JobOutput]) -> Iterator[Line]:
    for kept in texts:
        content = b"".join(store.open_blob(kept.digest)).decode("utf-8", "replace")
        for number, text in enumerate(content.split("\n")[:-1], start=1):
            yield Line(attempt=kept.attempt, rank=kept.rank, number=number, text=text)
