"""Records the events, curve points, progress and checkpoints of a running job, fenced by its claim.

Each write of a worker first locks the job row of its claim, and fails if the claim is no longer valid. Transactions
that lock several rows take them in one order, to prevent deadlocks: the database heartbeat or a worker, jobs by id, a
job's attempt, an artifact, and then the rows that refer to the artifact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from catalog.db.database import Database, read_clock
from catalog.errors import StaleClaim
from catalog.history import events, metric_store
from catalog.history.metric_points import Point
from catalog.lifecycle import trials
from catalog.registry import checkpoints
from catalog.states import JobState
from catalog.storage.manifest import Manifest, hide_unused, show_artifact
from catalog.tables.history import Checkpoint, JobEvent
from catalog.tables.jobs import Job
from catalog.tables.table import Json, new_id

KEPT_CHECKPOINTS = 2
"""Number of checkpoints whose files are kept: the newest one and a fallback."""
EVALUATED = ("valid_loss", "best_valid_loss")
"""Fields of a job's progress that come from evaluations on its validation file."""
_OPTIONAL = ("token_accuracy", "learning_rate", "grad_norm")


def hold(session: Session, claim_id: str) -> Job:
    """Return the job that `claim_id` holds, locked until the transaction ends. Raises StaleClaim."""
    row = select(Job).where(Job.claim_id == claim_id, Job.state == JobState.RUNNING)
    job = session.scalar(row.with_for_update(of=Job))
    if job is None:
        raise StaleClaim(claim_id)
    return job


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """Summary of a completed job's training."""

    steps: int
    kept_step: int
    """Step from which the adapter's weights are."""
    stopped_early: str | None
    """Sentence that explains why training stopped before the last step."""


def record_event(db: Database, claim_id: str, level: events.Level, message: str, data: Json | None = None) -> None:
    """Write an event for the users who watch the job."""
    with db.write() as session:
        job = hold(session, claim_id)
        now = read_clock(session)
        events.add(session, job.id, now=now, level=level, message=message, data=data)


def record_progress(db: Database, claim_id: str, progress: Json) -> None:
    """Replace step, loss, tokens_per_second and seconds_left of the job's progress. Evaluation results stay."""
    with db.write() as session:
        job = hold(session, claim_id)
        evaluated = {name: value for name, value in (job.progress or {}).items() if name in EVALUATED}
        job.progress = {**evaluated, **progress, "updated_at": read_clock(session)}


def record_metrics(db: Database, claim_id: str, points: Sequence[Json]) -> bool:
    """Store points of the job's curves. Returns True if the job is a pruned trial of a sweep and must stop.

    A point has kind (train, valid), step, loss, and if known token_accuracy, learning_rate, grad_norm, num_tokens and
    rewards (chosen, rejected, margin, accuracy). A replayed step overwrites the earlier point. Points whose loss is not
    finite are skipped. The last point of each kind is also written as an event of type `metrics`. The next heartbeats
    repeat the instruction to stop.
    """
    with db.write() as session:
        job = hold(session, claim_id)
        now = read_clock(session)
        measured = [_measured(point, now) for point in points if math.isfinite(point["loss"])]
        if measured:
            _keep(session, job, measured, now=now)
        return trials.observe(session, job, [point._asdict() for point in measured], now=now)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """The weights of a checkpoint, stored as an adapter, with their lineage record."""

    artifact: Manifest
    lineage: Json
    lineage_id: str


def record_checkpoint(
    db: Database, claim_id: str, *, step: int, artifact: Manifest, exported: Exported | None = None
) -> list[str]:
    """Record a checkpoint whose files are stored. Returns the digests of the manifests that are now unused.

    exported: the same weights as a model; None if they could not be exported. A checkpoint at a later step than all
    earlier ones counts as progress and resets the counts of failed attempts.
    """
    with db.write() as session:
        job = hold(session, claim_id)
        now = read_clock(session)
        last_step = session.scalar(select(func.max(Checkpoint.step)).where(Checkpoint.job_id == job.id))
        if last_step is None or step > last_step:
            job.counted_attempts = job.lost_attempts = 0
        checkpoint = _put_checkpoint(session, job, step=step, artifact=artifact, now=now)
        if exported is not None:
            _put_model(session, checkpoint, exported, now=now)
        events.add(session, job.id, now=now, message=f"Checkpoint created at step {step}", data={"step": step})
        return _drop_older(session, job, now=now)


def record_checkpoint_model(db: Database, claim_id: str, *, step: int, exported: Exported) -> None:
    """Add the exported model to a recorded checkpoint. Does nothing if that checkpoint was not stored."""
    with db.write() as session:
        job = hold(session, claim_id)
        checkpoint = session.scalar(_of_step(job, step).where(Checkpoint.artifact.is_not(None)))
        if checkpoint is not None:
            _put_model(session, checkpoint, exported, now=read_clock(session))


def distrust_checkpoint(db: Database, claim_id: str, *, checkpoint_id: str, problem: str) -> None:
    """Mark a checkpoint as unusable, because its files are damaged or missing or its weights are not finite.

    No attempt resumes from it again.
    """
    with db.write() as session:
        job = hold(session, claim_id)
        checkpoint = session.get(Checkpoint, checkpoint_id, with_for_update=True)
        if checkpoint is None or checkpoint.job_id != job.id or checkpoint.artifact is None:
            return
        now, digest = read_clock(session), checkpoint.artifact
        checkpoints.assign(session, checkpoint, "artifact", None, now=now)
        for unused in (digest, checkpoints.remove_model(session, checkpoint)):
            if unused is not None:
                hide_unused(session, unused)
        message = f"The checkpoint of step {checkpoint.step} can't be used: {problem}"
        events.add(session, job.id, now=now, level="warn", message=message)


def record_course(session: Session, job: Job, course: Course, *, now: float) -> None:
    """Write the summary of the training to the job's progress, and its surprising parts as events too."""
    of_all = f"{course.steps} of {job.num_steps}" if job.num_steps else f"{course.steps}"
    data: Json = {"step": course.steps, "total_steps": job.num_steps, "kept_step": course.kept_step}
    if course.stopped_early is not None:
        message = f"Training stopped early, at step {of_all}. {course.stopped_early}"
        events.add(session, job.id, now=now, message=message, data=data)
    if course.kept_step != course.steps:
        message = f"The adapter has the weights of step {course.kept_step}, which had the lowest validation loss"
        events.add(session, job.id, now=now, message=message, data=data)
    progress: Json = {"step": course.steps, "kept_step": course.kept_step, "stopped_early": course.stopped_early}
    kept = metric_store.at(session, job.id, "valid", [course.kept_step]).get(course.kept_step)
    progress["kept_valid_loss"] = None if kept is None else kept.loss
    job.progress = {**(job.progress or {}), **progress, "seconds_left": 0.0}


def held_out_point(session: Session, job: Job, step: int) -> Json | None:
    """The evaluation on the validation file at this step, or None."""
    point = metric_store.at(session, job.id, "valid", [step]).get(step)
    return None if point is None else point._asdict()


def resumable(session: Session, job_id: str) -> tuple[Checkpoint, ...]:
    """The checkpoints whose files are stored, newest first."""
    kept = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.artifact.is_not(None))
    return tuple(session.scalars(kept.order_by(Checkpoint.step.desc())))


def _measured(point: Json, now: float) -> Point:
    """The point without values that are not finite. `_keep` sets its `seq` once its event has a number."""
    assert point["kind"] in ("train", "valid")
    known = {name: value for name in _OPTIONAL if (value := point.get(name)) is not None and math.isfinite(value)}
    rewards: Json | None = point.get("rewards")
    is_known = rewards is not None and all(math.isfinite(value) for value in rewards.values())
    return Point(
        kind=point["kind"],
        step=point["step"],
        seq=0,
        created_at=now,
        loss=float(point["loss"]),
        num_tokens=point.get("num_tokens"),
        rewards=rewards if is_known else None,
        **{name: float(value) for name, value in known.items()},
    )


def _keep(session: Session, job: Job, measured: Sequence[Point], *, now: float) -> None:
    """Add the points to the curves, and write their events."""
    new_events = [
        _add_event(session, job, point, now=now) for point in {point.kind: point for point in measured}.values()
    ]
    session.flush()  # numbers the events
    seq = min(event.seq for event in new_events)
    for kind in ("train", "valid"):
        by_step = {point.step: point._replace(seq=seq) for point in measured if point.kind == kind}
        metric_store.put(session, job.id, kind, [by_step[step] for step in sorted(by_step)])
    evaluations = [point for point in measured if point.kind == "valid"]
    if evaluations:
        _show_evaluation(session, job, evaluations[-1].loss)


def _show_evaluation(session: Session, job: Job, loss: float) -> None:
    """Update the evaluation fields of the progress.

    The best loss is read from the curve, because steps that are repeated after a resume replace their points.
    """
    best = metric_store.least_loss(session, job.id, "valid")
    job.progress = {**(job.progress or {}), "valid_loss": loss, "best_valid_loss": best}


def _add_event(session: Session, job: Job, point: Point, *, now: float) -> JobEvent:
    """Write a `metrics` event in the wording and data format of the OpenAI API."""
    kind, step, loss = point.kind, point.step, point.loss
    of_all = f"{step}/{job.num_steps}" if job.num_steps else f"{step}"
    data: Json = {"step": step, "total_steps": job.num_steps, f"{kind}_loss": loss}
    data[f"{kind}_mean_token_accuracy"] = point.token_accuracy
    if kind == "train":
        data |= {"learning_rate": point.learning_rate, "grad_norm": point.grad_norm}
    if point.rewards is not None:
        data[f"{kind}_rewards"] = point.rewards
    word = "training" if kind == "train" else "validation"
    message = f"Step {of_all}: {word} loss={loss:.4f}"
    return events.add(session, job.id, now=now, type="metrics", message=message, data=data)


def _put_checkpoint(session: Session, job: Job, *, step: int, artifact: Manifest, now: float) -> Checkpoint:
    checkpoint = session.scalar(_of_step(job, step))
    if checkpoint is None:
        name = checkpoints.new_name(session, job, step=step)
        checkpoint = Checkpoint(id=new_id("ftckpt"), job_id=job.id, step=step, created_at=now, name=name)
        session.add(checkpoint)
    checkpoints.assign(session, checkpoint, "artifact", show_artifact(session, artifact, now=now), now=now)
    session.flush()
    return checkpoint


def _of_step(job: Job, step: int) -> Select[Checkpoint]:
    """The checkpoint of this step, locked because a user may delete its model concurrently."""
    return select(Checkpoint).where(Checkpoint.job_id == job.id, Checkpoint.step == step).with_for_update()


def _put_model(session: Session, checkpoint: Checkpoint, exported: Exported, *, now: float) -> None:
    digest = show_artifact(session, exported.artifact, now=now)
    checkpoints.assign(session, checkpoint, "adapter", digest, now=now)
    checkpoint.lineage, checkpoint.lineage_id = exported.lineage, exported.lineage_id
    session.flush()


def _drop_older(session: Session, job: Job, *, now: float) -> list[str]:
    stale = resumable(session, job.id)[KEPT_CHECKPOINTS:]
    digests = {checkpoint.artifact for checkpoint in stale if checkpoint.artifact}
    for checkpoint in stale:
        checkpoints.assign(session, checkpoint, "artifact", None, now=now)
        if (adapter := checkpoints.remove_model(session, checkpoint)) is not None:
            digests.add(adapter)
    return [digest for digest in sorted(digests) if hide_unused(session, digest)]
