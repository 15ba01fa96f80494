"""Records how far a job's curves are written to the runs in its experiment trackers.

Workers write from the database, not from the trainer. They therefore delay no training, lose nothing, and continue
where another worker stopped. A worker holds the lease while it has a run open, and renews it with each write.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import cast

from sqlalchemy import select
from sqlalchemy.orm import Session

from catalog.db.database import Database, read_clock
from catalog.errors import StaleClaim
from catalog.history import events, metric_store
from catalog.history.metric_points import Point
from catalog.spec.integrations import Integration
from catalog.states import FINAL_STATES, JobState
from catalog.tables.history import TrackerRunRow
from catalog.tables.jobs import Job
from catalog.tables.storage import Adapter
from catalog.tables.table import Json
from catalog.tables.tenancy import Project
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskClaim, TaskKind

TRACKER_LEASE_SECONDS = 120.0
MAX_POINTS = 500
KINDS: Mapping[str, TaskKind] = {
    "wandb": TaskKind.TRACK_WANDB,
    "mlflow": TaskKind.TRACK_MLFLOW,
    "tensorboard": TaskKind.TRACK_TENSORBOARD,
}
"""The kind of the task of a run, by the type of its tracker. Its subject is the job."""
TYPES = {kind: each for each, kind in KINDS.items()}
FIELDS = ("loss", "token_accuracy", "learning_rate", "grad_norm", "num_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackerRunClaim:
    """A run that this worker has claimed, as of its last write."""

    task: TaskClaim
    row: TrackerRunRow


@dataclass(frozen=True, kw_only=True, slots=True)
class RunUpdate:
    """The data to write to the tracker next."""

    run: Json
    """Description of the job: id, project, options, config."""
    points: list[Json] = field(default_factory=list[Json])
    end: Json | None = None
    """Result of the job; set once all of its points are written or included here."""
    has_more: bool = False


def add(session: Session, job: Job, integrations: Sequence[Integration]) -> None:
    for one in integrations:
        session.add(TrackerRunRow(job_id=job.id, type=one.type, train_step=-1, valid_step=-1))


def on_transition(session: Session, job: Job, before: JobState | None, *, now: float) -> None:
    """Make the job's runs due if it starts to train or reaches a final state."""
    if job.state == JobState.RUNNING or job.state in FINAL_STATES:
        wake(session, job, now=now)


def wake(session: Session, job: Job, *, now: float) -> None:
    """Make the job's unfinished runs due now. The caller has locked the job."""
    if job.requested.get("integrations"):
        unfinished = select(TrackerRunRow).where(TrackerRunRow.job_id == job.id, TrackerRunRow.finished_at.is_(None))
        for row in session.scalars(unfinished.order_by(TrackerRunRow.type)):
            task_queue.add(session, KINDS[row.type], job.id, project_id=job.project_id, run_after=now)


def claim(db: Database, *, types: Collection[str], limit: int) -> list[TrackerRunClaim]:
    """Claim due runs of the types that this worker can write."""
    kinds, found = [KINDS[each] for each in types], list[TrackerRunClaim]()
    while len(found) < limit:
        task = task_queue.claim(db, kinds, lease_seconds=TRACKER_LEASE_SECONDS)
        if task is None:
            break
        with db.read() as session:
            row = session.get_one(TrackerRunRow, (task.subject, TYPES[task.kind]))
        found.append(TrackerRunClaim(task=task, row=row))
    return found


def poll(db: Database, run: TrackerRunClaim) -> RunUpdate:
    """Return the data in the database that the run lacks."""
    with db.read() as session:
        job = session.get_one(Job, run.row.job_id)
        is_final = job.state in FINAL_STATES  # read before the points, so that a final job has no later ones
        points = sorted(_points_after(session, run.row), key=lambda point: (point["step"], point["kind"]))
        has_more = len(points) > MAX_POINTS
        end = _end(session, job) if is_final and not has_more else None
        description = _description(session, job, run.row.type)
        return RunUpdate(run=description, points=points[:MAX_POINTS], end=end, has_more=has_more)


def record(db: Database, run: TrackerRunClaim, run_update: RunUpdate, *, run_id: str) -> TrackerRunClaim | None:
    """Record the written data, and renew the claim while the job trains. Returns None if the worker must close the run:
    it is complete, the job does not train now, or another worker has claimed it."""
    try:
        with db.write() as session:
            row, job = _locked(session, run)
            task_queue.progress(session, run.task, lease_seconds=TRACKER_LEASE_SECONDS)
            row.run_id = run_id
            for point in run_update.points:
                column = f"{point['kind']}_step"
                setattr(row, column, max(getattr(row, column), point["step"]))
            if run_update.end is not None:
                row.finished_at = read_clock(session)
            elif job.state in (JobState.RUNNING, *FINAL_STATES) or _points_after(session, row):
                return TrackerRunClaim(task=run.task, row=row)
            task_queue.finish(session, run.task)  # it is due again when the job trains
    except StaleClaim:
        pass
    return None


def release(db: Database, run: TrackerRunClaim) -> None:
    """Release the run, for example at a worker's shutdown. Another worker can continue immediately."""
    with suppress(StaleClaim):
        task_queue.release(db, run.task)


def fail(db: Database, run: TrackerRunClaim, problem: str) -> None:
    """Record a failure, and retry later. After the last retry, the run is abandoned.

    The first failure and the end of all retries each add one event to the job's log.
    """
    with suppress(StaleClaim), db.write() as session:
        row, _ = _locked(session, run)
        now = read_clock(session)
        problem_text = f"Writing to the integration {row.type} failed: {problem}"
        if not task_queue.retry(session, run.task):
            row.finished_at = now
            events.add(session, row.job_id, now=now, level="warn", message=f"{problem_text} It will not be retried.")
        elif row.error is None:
            message = f"{problem_text} Training continues, and writing will be retried."
            events.add(session, row.job_id, now=now, level="warn", message=message)
        row.error = row.error or problem


def _locked(session: Session, run: TrackerRunClaim) -> tuple[TrackerRunRow, Job]:
    """Return the run and its job, which is locked. A transaction that makes the job train again waits for this lock,
    and wakes the run afterwards. Raises StaleClaim."""
    job = task_queue.hold(session, run.task, Job)
    return session.get_one(TrackerRunRow, (run.row.job_id, run.row.type), populate_existing=True), job


def _points_after(session: Session, row: TrackerRunRow) -> list[Json]:
    """Return the next points of both curves that the run lacks."""
    steps = {"train": row.train_step, "valid": row.valid_step}
    found = (metric_store.some(session, row.job_id, kind, after_step=step) for kind, step in steps.items())
    return [_point(point) for points in found for point in points]


def _point(row: Point) -> Json:
    values = {name: getattr(row, name) for name in FIELDS}
    values |= {f"rewards/{name}": value for name, value in (row.rewards or {}).items()}
    known = {f"{row.kind}/{name}": float(value) for name, value in values.items() if value is not None}
    return {"kind": row.kind, "step": row.step, "at": row.created_at, "values": known}


def _description(session: Session, job: Job, wanted: str) -> Json:
    asked = [Integration.model_validate(one) for one in job.requested.get("integrations") or ()]
    return {
        "job_id": job.id,
        "project": session.get_one(Project, job.project_id).name,
        "options": next(one for one in asked if one.type == wanted).options().model_dump(mode="json"),
        "config": {"model": job.base_model, "base_digest": job.base_digest, **_flat(job.spec)},
    }


def _flat(value: Json, prefix: str = "") -> Json:
    """Flatten nested objects to {"lora.rank": 16, …}, without None values."""
    found: Json = {}
    for name, inner in value.items():
        if isinstance(inner, dict):
            found |= _flat(cast(Json, inner), f"{prefix}{name}.")
        elif inner is not None:
            found[f"{prefix}{name}"] = inner
    return found


def _end(session: Session, job: Job) -> Json:
    """Return the job's result: its state, and the metrics of its adapter."""
    adapter = session.scalar(select(Adapter).where(Adapter.job_id == job.id))
    figures: Json = {"trained_tokens": job.trained_tokens, **((adapter.evaluation or {}) if adapter else {})}
    numbers = {name: value for name, value in _flat(figures, "final.").items() if isinstance(value, int | float)}
    return {
        "status": job.state,
        "reason": job.reason,
        "adapter": job.adapter_name,
        "lineage_id": adapter.lineage_id if adapter else None,
        "error": (job.error or {}).get("message"),
        "numbers": numbers,
    }
