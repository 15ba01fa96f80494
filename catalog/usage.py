"""What projects have used of devices, and what each is due: charged while jobs train, read to decide who trains next.

What was used long ago counts less: see scheduling/shares.py. Of a project there are SLOTS rows, so that workers who
charge it at one time don't wait for each other; a row a worker would do as well, but each start of one has a new id.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from functools import cache

from sqlalchemy import CompoundSelect, Select, func, literal, select, union_all
from sqlalchemy.orm import Session, aliased

from catalog import heads
from catalog.db import add_if_missing
from catalog.scheduling import shares
from catalog.scheduling.picture import Policy, Share
from catalog.spec import PriorityClass
from catalog.states import JobState
from catalog.tables import Attempt, Job, Project, ProjectUsage, Worker

SLOTS = 16


def charge_beat(session: Session, jobs: Iterable[Job], worker: Worker | None, *, now: float, policy: Policy) -> None:
    """Charge jobs that train, whose rows are locked, from the last charge until now: all that their trainers hold."""
    training = [job for job in jobs if job.state == JobState.RUNNING]
    beside = Counter(job.trainer_id for job in training)
    owed: defaultdict[str, float] = defaultdict(float)
    for job in training:
        owed[job.project_id] += _take_stock(job, worker, num_jobs=beside[job.trainer_id], now=now)
    for project_id in sorted(owed):  # in one order, so that nobody waits in a circle
        row = _locked(session, project_id, worker, now=now)
        row.device_seconds = _left(row, now=now, policy=policy) + owed[project_id]
        row.as_of = now


def charge_end(session: Session, job: Job, *, now: float) -> None:
    """Charge a job whose attempt is about to end, and whose row is locked, for the seconds since the last heartbeat.

    Of a worker that is lost or leaves these are not charged to anybody.
    """
    beside = select(func.count()).select_from(Attempt)
    beside = beside.where(Attempt.trainer_id == job.trainer_id, Attempt.ended_at.is_(None))
    worker = session.get(Worker, job.worker_id) if job.worker_id else None
    owed = _take_stock(job, worker, num_jobs=session.scalar(beside) or 1, now=now)
    _locked(session, job.project_id, worker, now=now).device_seconds += owed


def shares_of_waiting(session: Session, *, now: float, policy: Policy) -> dict[str, Share]:
    """The share of each project that has something in the queue."""
    standing = session.execute(_standings()).all()
    used_by = used(session, {row.project_id for row in standing}, now=now, policy=policy)
    return {
        row.project_id: Share(weight=row.weight, device_seconds=used_by[row.project_id], num_running=row.num_running)
        for row in standing
    }


def served_at(session: Session) -> dict[int, float]:
    """By class, when a job of it was last claimed; a class that never was is not there."""
    rows = ((row[0], row[1]) for row in session.execute(_latest_claims()))
    return {priority: at for priority, at in rows if at is not None}


def _take_stock(job: Job, worker: Worker | None, *, num_jobs: int, now: float) -> float:
    """What the job owes since it was charged last; noted on its row."""
    since = now if job.charged_at is None else job.charged_at
    owed = shares.charge(now - since, num_devices=len(worker.devices) if worker else 1, num_jobs=num_jobs)
    job.charged_at, job.device_seconds = now, job.device_seconds + owed
    return owed


def _locked(session: Session, project_id: str, worker: Worker | None, *, now: float) -> ProjectUsage:
    """The project's row that this worker adds to."""
    key = {"project_id": project_id, "slot": zlib.crc32(worker.id.encode()) % SLOTS if worker else 0}
    row = session.get(ProjectUsage, key, with_for_update=True, populate_existing=True)
    if row is None:
        add_if_missing(session, ProjectUsage, {**key, "device_seconds": 0.0, "as_of": now})
        row = session.get_one(ProjectUsage, key, with_for_update=True, populate_existing=True)
    return row


def _left(row: ProjectUsage, *, now: float, policy: Policy) -> float:
    return shares.decay(row.device_seconds, now - row.as_of, half_life_seconds=policy.half_life_seconds)


def used(session: Session, project_ids: Collection[str], *, now: float, policy: Policy) -> defaultdict[str, float]:
    found: defaultdict[str, float] = defaultdict(float)
    for row in session.scalars(select(ProjectUsage).where(ProjectUsage.project_id.in_(project_ids))):
        found[row.project_id] += _left(row, now=now, policy=policy)
    return found


@cache
def _latest_claims() -> CompoundSelect[int, float | None]:
    classes = [int(priority) for priority in PriorityClass]
    return union_all(
        *(select(literal(number), func.max(Job.claimed_at)).where(Job.priority == number) for number in classes)
    )


@cache
def _standings() -> Select[str, float, int]:
    """Of each project that has something in the queue its weight, and how many of its jobs run."""
    found, running = heads.projects(JobState.QUEUED), aliased(Job)
    runs = select(func.count()).select_from(running)
    runs = runs.where(running.state == JobState.RUNNING, running.project_id == found.c.project_id).correlate(found)
    columns = (Project.id.label("project_id"), Project.weight, runs.scalar_subquery().label("num_running"))
    return select(*columns).join(found, found.c.project_id == Project.id)
