"""Charges device time to projects while their jobs train, and reads each project's usage for fair-share scheduling.

Usage decays over time: see catalog/scheduling/ordering.py. Each project has SLOTS usage rows, so that workers that
charge it concurrently don't wait for each other's row lock. One row per worker would also avoid that, but a worker has
a new id at each start, so the table would grow without limit.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any
from typing import cast as cast_to

from sqlalchemy import Select, Text, bindparam, cast, func, select
from sqlalchemy.orm import Session

from catalog.db.database import Database, add_if_missing, read_clock
from catalog.fleet import views
from catalog.lifecycle import candidates
from catalog.resources.sharding import reported_group
from catalog.scheduling import ordering
from catalog.scheduling.snapshot import Policy, Share, WorkerService
from catalog.states import JobState, PriorityClass
from catalog.tables.fleet import SILENT_SECONDS, Worker, has_gpu, quantizations_on
from catalog.tables.history import Attempt
from catalog.tables.jobs import Job
from catalog.tables.table import Json
from catalog.tables.tenancy import Project, ProjectUsage
from catalog.usage import ledger

SLOTS = 16
"""Usage rows per project."""


def charge_beat(session: Session, jobs: Iterable[Job], worker: Worker | None, *, now: float, policy: Policy) -> None:
    """Charge each running job for the time since its last charge. Other jobs are skipped.

    The caller has locked the rows of `jobs`, which include every job of each trainer.
    """
    training = [job for job in jobs if job.state == JobState.RUNNING]
    num_by_trainer = Counter(job.trainer_id for job in training)
    num_devices = _num_devices(session, worker) if training else 1
    owed: defaultdict[str, float] = defaultdict(float)
    for job in training:
        num_jobs = num_by_trainer[job.trainer_id]
        charged = _charge_job(session, job, num_devices=num_devices, num_jobs=num_jobs, now=now, policy=policy)
        owed[job.project_id] += charged * policy.multiple(job.priority)
    for project_id in sorted(owed):  # a fixed lock order prevents deadlocks
        row = _locked(session, project_id, worker, now=now)
        row.device_seconds = _decayed(row, now=now, policy=policy) + owed[project_id]
        row.as_of = now


def settle(db: Database, trainer_id: str, *, policy: Policy) -> None:
    """Charge all jobs of the trainer up to now.

    Call it before a job joins or leaves, so that each second is charged to the jobs that shared the trainer during it.
    Opens its own transaction, because it locks the jobs in the order of their ids, as a heartbeat does.
    """
    with db.write() as session:
        now = read_clock(session)
        running = (Job.state == JobState.RUNNING, Job.trainer_id == trainer_id)
        rows = select(Job).where(Job.id.in_(_jobs_of_trainer(trainer_id)), *running)
        jobs = list(session.scalars(rows.order_by(Job.id).with_for_update()))
        if jobs:
            charge_beat(session, jobs, session.get(Worker, jobs[0].worker_id), now=now, policy=policy)


def charge_end(session: Session, job: Job, *, now: float, policy: Policy) -> None:
    """Charge a job whose attempt is about to end for the time since `settle`. The caller has locked its row.

    If a worker is lost or exits, the seconds since its last heartbeat are not charged to any project.
    """
    num_jobs = session.scalar(select(func.count()).select_from(_jobs_of_trainer(job.trainer_id).subquery())) or 1
    worker = session.get(Worker, job.worker_id) if job.worker_id else None
    num_devices = _num_devices(session, worker)
    owed = _charge_job(session, job, num_devices=num_devices, num_jobs=num_jobs, now=now, policy=policy)
    owed *= policy.multiple(job.priority)
    row = _locked(session, job.project_id, worker, now=now)
    row.device_seconds, row.as_of = _decayed(row, now=now, policy=policy) + owed, now


def shares_of_waiting(session: Session, *, now: float, policy: Policy) -> dict[str, Share]:
    """The fair-share state of each project that has a queued job."""
    return _shares(session, JobState.QUEUED, now=now, policy=policy)


def shares_of_training(session: Session, *, now: float, policy: Policy) -> dict[str, Share]:
    """The fair-share state of each project that has a running job."""
    return _shares(session, JobState.RUNNING, now=now, policy=policy)


def _shares(session: Session, state: JobState, *, now: float, policy: Policy) -> dict[str, Share]:
    usage_rows = session.execute(_usage_rows(state)).all()
    used_by: defaultdict[str, float] = defaultdict(float)
    for row in usage_rows:
        used_by[row.project_id] += 0.0 if row.as_of is None else _decayed(row, now=now, policy=policy)
    running, devices_in_use = _running(session, used_by)
    return {
        row.project_id: Share(
            weight=row.weight,
            device_seconds=used_by[row.project_id],
            num_running=running[row.project_id],
            devices_in_use=devices_in_use[row.project_id],
        )
        for row in usage_rows
    }


def served(session: Session, *, now: float) -> list[WorkerService]:
    """The classes that live workers have served, and when.

    Workers with the same devices and memory are merged into one entry. Workers that have served no class are skipped.
    """
    latest: defaultdict[tuple[int, str], dict[tuple[str, int], float]] = defaultdict(dict)
    for memory_bytes, devices_json, served_at in session.execute(_services(), {"since": now - SILENT_SECONDS}):
        latest_at = latest[memory_bytes, devices_json]
        for group, at in _by_project_and_class(served_at):
            if at <= now:  # a time in the future was written before the clock was set back
                latest_at[group] = max(at, latest_at.get(group, at))
    found: list[WorkerService] = []
    for (memory_bytes, devices_json), latest_at in latest.items():
        devices = json.loads(devices_json)
        can_load, recomputes = quantizations_on(devices), has_gpu(devices)
        service = WorkerService(at=latest_at, memory_bytes=memory_bytes, recomputes=recomputes, can_load=can_load)
        found.append(replace(service, group=reported_group(devices, memory_bytes)))
    return found


def record_service(worker: Worker, groups: Iterable[tuple[str, int]], *, now: float, policy: Policy) -> None:
    """Record that the worker has claimed the first job of each of these (project, class) pairs. Its row is locked.

    Drops times that are so old that priority aging has since raised every class above `urgent`: they no longer affect
    a decision.
    """
    kept: Json = {}
    oldest = now - (len(PriorityClass) + 1) * policy.priority_aging_seconds
    for (project_id, priority), at in [*_by_project_and_class(worker.served_at), *((group, now) for group in groups)]:
        if at >= oldest:
            kept.setdefault(project_id, {})[str(priority)] = at
    worker.served_at = kept


def _by_project_and_class(served_at: Json | None) -> Iterator[tuple[tuple[str, int], float]]:
    """The times by (project, class)."""
    for project_id, classes in cast_to(dict[str, dict[str, float]], served_at or {}).items():
        yield from (((project_id, int(priority)), at) for priority, at in classes.items())


def _jobs_of_trainer(trainer_id: str | None) -> Select[str]:
    """Ids of the trainer's jobs whose attempt has not ended."""
    return select(Attempt.job_id).where(Attempt.trainer_id == trainer_id, Attempt.ended_at.is_(None))


def _running(session: Session, waiting: Collection[str]) -> tuple[Counter[str], defaultdict[str, float]]:
    """The number of running jobs of each of these projects, and the (fractional) number of devices they use."""
    rows, lent = session.execute(_packs()).all(), views.lent_devices(session)
    num_by_trainer: Counter[str | None] = Counter()
    for row in rows:
        num_by_trainer[row.trainer_id] += row.number
    running: Counter[str] = Counter()
    devices_in_use: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        if row.project_id in waiting:
            running[row.project_id] += row.number
            num_devices = views.count_devices(row.worker_id, row.devices, lent)
            devices_in_use[row.project_id] += num_devices * row.number / num_by_trainer[row.trainer_id]
    return running, devices_in_use


def _num_devices(session: Session, worker: Worker | None) -> int:
    return 1 if worker is None else views.count_devices(worker.id, worker.devices, views.lent_devices(session))


def _charge_job(session: Session, job: Job, *, num_devices: int, num_jobs: int, now: float, policy: Policy) -> float:
    """The device-seconds that the job owes since its last charge. Adds them to its row and to the ledger."""
    since = now if job.charged_at is None else job.charged_at
    elapsed = min(now - since, policy.lease_seconds)
    owed = ordering.charge(elapsed, num_devices=num_devices, num_jobs=num_jobs)
    job.charged_at, job.device_seconds = now, job.device_seconds + owed
    ledger.add(session, job, "device_seconds", owed, now=now)
    return owed


def _locked(session: Session, project_id: str, worker: Worker | None, *, now: float) -> ProjectUsage:
    """The locked usage row of the project to which this worker adds. Creates a missing row."""
    key = {"project_id": project_id, "slot": zlib.crc32(worker.id.encode()) % SLOTS if worker else 0}
    row = session.get(ProjectUsage, key, with_for_update=True, populate_existing=True)
    if row is None:
        add_if_missing(session, ProjectUsage, {**key, "device_seconds": 0.0, "as_of": now})
        row = session.get_one(ProjectUsage, key, with_for_update=True, populate_existing=True)
    return row


def _decayed(row: Any, *, now: float, policy: Policy) -> float:
    """The device-seconds of a usage row, decayed until now."""
    return ordering.decay(row.device_seconds, now - row.as_of, half_life_seconds=policy.half_life_seconds)


def used(session: Session, project_ids: Collection[str], *, now: float, policy: Policy) -> defaultdict[str, float]:
    """The decayed device-seconds of each of these projects."""
    found: defaultdict[str, float] = defaultdict(float)
    for row in session.scalars(select(ProjectUsage).where(ProjectUsage.project_id.in_(project_ids))):
        found[row.project_id] += _decayed(row, now=now, policy=policy)
    return found


@cache
def _usage_rows(state: JobState) -> Select[*tuple[Any, ...]]:
    """One row per usage row of each project that has a job in `state`: project id, weight, usage."""
    found = candidates.projects(state)
    usage = (ProjectUsage.device_seconds, ProjectUsage.as_of)
    usage_rows = select(Project.id.label("project_id"), Project.weight, *usage)
    usage_rows = usage_rows.join(found, found.c.project_id == Project.id)
    return usage_rows.outerjoin(ProjectUsage, ProjectUsage.project_id == Project.id)


@cache
def _packs() -> Select[*tuple[Any, ...]]:
    """The number of running jobs of each project in each trainer, with the devices of its worker."""
    number = func.count().label("number")
    packs = select(Job.project_id, Job.trainer_id, Job.worker_id, number).where(Job.state == JobState.RUNNING)
    found = packs.group_by(Job.project_id, Job.trainer_id, Job.worker_id).subquery()
    return select(found, Worker.devices).outerjoin(Worker, Worker.id == found.c.worker_id)


@cache
def _services() -> Select[int, str, Json | None]:
    """Memory and devices of live workers, and the times at which they last served each class."""
    live = (Worker.ended_at.is_(None), Worker.heartbeat_at > bindparam("since"), Worker.served_at.is_not(None))
    return select(Worker.memory_bytes, cast(Worker.devices, Text), Worker.served_at).where(*live)
