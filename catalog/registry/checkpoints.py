"""Checkpoints as models: their weights in PEFT's layout, read like an adapter while they are kept.

An adapter of a checkpoint was not loaded by PEFT before it is shown: that is done at a job's end alone.
"""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import ColumnElement, Select, exists, select
from sqlalchemy.orm import Session

from catalog.db.database import read_clock
from catalog.errors import Conflict, NoLongerKept
from catalog.states import UNFINISHED_STATES
from catalog.tables.history import Checkpoint
from catalog.tables.jobs import Job
from catalog.tables.storage import Adapter, Artifact
from catalog.tables.table import new_id
from catalog.tables.tenancy import Project
from catalog.usage import ledger

MARK = ":ckpt-step-"
ID_PREFIX = "ftckpt-"
NOT_VERIFIED: dict[str, Any] = {
    "passed": None,
    "explanation": "PEFT has not loaded it: only the adapter that a job ends with is verified.",
}


def is_named(name: str) -> bool:
    """Whether it is the form of a checkpoint's name, or of its id."""
    return MARK in name or name.startswith(ID_PREFIX)


def shown_name(job: Job, checkpoint: Checkpoint, *, project_name: str) -> str:
    """The wire's fine_tuned_model_checkpoint. Some of before have none on record, and no files either."""
    return checkpoint.name or f"{job.adapter_name or _stem(job, project_name)}{MARK}{checkpoint.step}"


def new_name(session: Session, job: Job, *, step: int) -> str:
    """The name that its job's adapter will have, and the step; with other last characters where that is another's."""
    stem, mark = _stem(job, session.get_one(Project, job.project_id).name), f"{MARK}{step}"
    name = f"{stem}{mark}"
    while session.scalar(select(Checkpoint.id).where(Checkpoint.name == name, Checkpoint.job_id != job.id).limit(1)):
        name = f"{stem.rpartition(':')[0]}:{new_id('x')[-8:]}{mark}"
    return name


def row(session: Session, is_visible: ColumnElement[bool], name: str, *, locked: bool = False) -> Checkpoint | None:
    """By name or id, of those of which `is_visible` holds, which may ask about Job too."""
    is_it = Checkpoint.id == name if name.startswith(ID_PREFIX) else Checkpoint.name == name
    found = select(Checkpoint).join(Job, Job.id == Checkpoint.job_id).where(is_it, is_visible)
    return session.scalar(found.with_for_update(of=Checkpoint) if locked else found)


def as_adapter(session: Session, checkpoint: Checkpoint, *, param: str | None = None) -> Adapter:
    """What reads adapters reads it too; the row is of no table. Raises NoLongerKept."""
    if checkpoint.adapter is None or checkpoint.lineage is None or checkpoint.name is None:
        raise NoLongerKept(
            "checkpoint",
            checkpoint.name or checkpoint.id,
            remedy="Those of a job's newest two are kept, until seven days after the job's end or until somebody "
            "deletes them. Use the job's adapter, or another of GET /v1/fine_tuning/jobs/ID/checkpoints.",
            param=param,
        )
    job = session.get_one(Job, checkpoint.job_id)
    return Adapter(
        id=checkpoint.id,
        name=checkpoint.name,
        job_id=job.id,
        project_id=job.project_id,
        base_model=job.base_model,
        base_digest=job.base_digest,
        artifact=checkpoint.adapter,
        num_parameters=checkpoint.lineage["outputs"]["num_parameters"],
        verification=NOT_VERIFIED,
        evaluation=None,
        lineage=checkpoint.lineage,
        lineage_id=checkpoint.lineage_id,
        created_at=checkpoint.created_at,
        deleted_at=None,
    )


def step_of(adapter: Adapter) -> int | None:
    """Of a checkpoint's; None of what a job ended with."""
    return int(adapter.name.rpartition(MARK)[2]) if adapter.id.startswith(ID_PREFIX) else None


def kept() -> Select[Checkpoint, Job]:
    """Checkpoints that can be used as models, with their jobs."""
    return select(Checkpoint, Job).join(Job, Job.id == Checkpoint.job_id).where(Checkpoint.adapter.is_not(None))


def is_continued() -> ColumnElement[bool]:
    """A job that has not ended begins with it: its files are read at each attempt."""
    child = Job.__table__.alias("child")
    return exists().where(child.c.parent_adapter == Checkpoint.id, child.c.state.in_(UNFINISHED_STATES))


def assign(
    session: Session, checkpoint: Checkpoint, field: Literal["artifact", "adapter"], digest: str | None, *, now: float
) -> None:
    """Set what a job resumes from (`artifact`), or the checkpoint's weights as a model (`adapter`), of a row that is
    locked. The job's project is charged the difference in bytes."""
    before: str | None = getattr(checkpoint, field)
    if digest != before:
        project_id = session.get_one(Job, checkpoint.job_id).project_id
        difference = _num_bytes(session, digest) - _num_bytes(session, before)
        ledger.store(session, project_id, difference, now=now)
        setattr(checkpoint, field, digest)


def _num_bytes(session: Session, digest: str | None) -> int:
    return 0 if digest is None else session.get_one(Artifact, digest).num_bytes


def let_go(session: Session, checkpoint: Checkpoint) -> str | None:
    """Forget its adapter, unless a job that has not ended continues it. Returns the digest that it had.

    Its record stays where some job ever began with it: that job's record names it.
    """
    session.flush()
    session.refresh(checkpoint, with_for_update=True)  # a job that begins with it holds it until that can be seen
    digest = checkpoint.adapter
    if digest is None or session.scalar(select(Checkpoint.id).where(Checkpoint.id == checkpoint.id, is_continued())):
        return None
    assign(session, checkpoint, "adapter", None, now=read_clock(session))
    if session.scalar(select(Job.id).where(Job.parent_adapter == checkpoint.id).limit(1)) is None:
        checkpoint.lineage = checkpoint.lineage_id = None
    return digest


def delete(session: Session, checkpoint: Checkpoint) -> None:
    """As an adapter is deleted. What its job goes on from stays. Raises Conflict while a job continues it."""
    if checkpoint.adapter is not None and let_go(session, checkpoint) is None:
        raise Conflict(
            f"The checkpoint {checkpoint.name!r} is continued by a job that has not ended.",
            code="checkpoint_in_use",
            remedy="Wait until the job ends, or cancel it; then delete the checkpoint.",
            param="model",
        )
    session.flush()


def expire(session: Session) -> None:
    """Let go of those that their jobs don't keep any more, and that nobody continues."""
    due = select(Checkpoint).where(Checkpoint.adapter.is_not(None), Checkpoint.artifact.is_(None))
    for checkpoint in session.scalars(due.order_by(Checkpoint.id)).all():
        let_go(session, checkpoint)


def _stem(job: Job, project_name: str) -> str:
    return f"ft:{job.base_model}:{project_name}:{job.suffix or ''}:{job.id[-8:]}"
