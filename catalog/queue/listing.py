"""Lists the queue in its order, for the claims that choose from it and for users."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.orm import Session

from catalog.db.database import Database, read_clock
from catalog.fleet import views
from catalog.lifecycle.candidates import CandidateFilter, num_groups, waiting
from catalog.queue import charging
from catalog.scheduling.ordering import QueueEntry, order
from catalog.scheduling.snapshot import USUAL, Candidate, Policy
from catalog.states import UNFINISHED_STATES, PriorityClass
from catalog.tables.jobs import Job
from catalog.tables.table import Json
from catalog.tables.tenancy import Project

MAX_SHOWN = 5000
"""Maximum number of jobs that are listed, and from which queue positions are calculated."""
SHOWN = (
    "state",
    "base_model",
    "priority",
    "run_after",
    "attempt",
    "worker_id",
    "trainer_id",
    "progress",
    "suffix",
    "is_held",
)
"""Columns of a job that its queue entry returns unchanged."""


def queue_entries(session: Session, *, now: float, policy: Policy = USUAL) -> list[QueueEntry]:
    """The claimable jobs in queue order, at most about MAX_SHOWN.

    The limit is split evenly among the classes of all projects. A class with fewer jobs leaves its remainder to the
    others.
    """
    shares = charging.shares_of_waiting(session, now=now, policy=policy)
    return order(
        candidates(session, now=now), now, shares=shares, served=charging.served(session, now=now), policy=policy
    )


def candidates(session: Session, *, now: float) -> list[Candidate]:
    """The jobs that `queue_entries` sorts, unsorted."""
    per_group = math.ceil(MAX_SHOWN / max(1, num_groups(session)))
    while True:
        found = waiting(session, CandidateFilter(), now=now, per_group=per_group)
        sizes = Counter((candidate.project_id, candidate.priority) for candidate in found)
        full = [size for size in sizes.values() if size == per_group]
        left = MAX_SHOWN - len(found)
        if left <= 0 or not full:
            return found
        per_group += math.ceil(left / len(full))


def snapshot(db: Database, *, project_id: str | None, policy: Policy = USUAL) -> Json:
    """The queue as users see it: counts, waiting jobs in order, then running jobs. `project_id` None: all projects.

    Positions refer to the whole queue: a project sees how many jobs are ahead of its own, but not whose they are.
    """
    with db.snapshot() as session:
        now = read_clock(session)
        places = {entry.candidate.job_id: entry for entry in queue_entries(session, now=now, policy=policy)}
        entries = [_entry(row, places.get(row.id), now=now) for row in _unfinished(session, project_id)]
        entries.sort(key=lambda entry: (entry["position"] is None, entry["position"] or 0))
        return {
            "as_of": now,
            "counts": dict(Counter(entry["state"] for entry in entries)),
            "waiting_in_all": len(places),
            "jobs": entries,
            "workers": views.count_live(session, now=now),
        }


def _unfinished(session: Session, project_id: str | None) -> Sequence[Row[*tuple[Any, ...]]]:
    columns = [getattr(Job, name) for name in ("id", "created_at", "queued_at", *SHOWN)]
    rows = select(*columns, Project.name.label("project")).join(Project, Project.id == Job.project_id)
    rows = rows.where(Job.state.in_(UNFINISHED_STATES))
    if project_id is not None:
        rows = rows.where(Job.project_id == project_id)
    return session.execute(rows.order_by(Job.created_at, Job.id).limit(MAX_SHOWN)).all()


def _entry(row: Row[*tuple[Any, ...]], entry: QueueEntry | None, *, now: float) -> Json:
    shown = {name: getattr(row, name) for name in SHOWN}
    return {
        **shown,
        "job_id": row.id,
        "project": row.project,
        "priority": PriorityClass(row.priority).name,
        "created_at": row.created_at,
        "waited_seconds": max(0.0, now - (row.created_at if row.queued_at is None else row.queued_at)),
        "position": entry.position if entry else None,
        "reason": entry.reason if entry else None,
    }
