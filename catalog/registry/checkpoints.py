"""Checkpoints as models: while its files are kept, a checkpoint's weights can be read like an adapter.

These weights are in PEFT's layout, but are not verified with PEFT: only a job's final adapter is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import ColumnElement, Select, case, exists, select
from sqlalchemy.orm import Session

from catalog.db.database import read_clock
from catalog.errors import NUM_NAMED, Conflict, NoLongerKept, listed
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
    "explanation": "Not verified with PEFT: only the final adapter of a job is verified.",
}


def is_named(name: str) -> bool:
    """Whether `name` has the form of a checkpoint's name or id."""
    return MARK in name or name.startswith(ID_PREFIX)


def new_name(session: Session, job: Job, *, step: int) -> str:
    """Return a name for a checkpoint: the expected name of its job's adapter, and the step.

    If another job's checkpoint has that name, the last characters of the adapter's name are random.
    """
    project, marker = session.get_one(Project, job.project_id).name, f"{MARK}{step}"
    stem = f"ft:{job.base_model}:{project}:{job.suffix or ''}:{job.id[-8:]}"
    name = f"{stem}{marker}"
    while session.scalar(select(Checkpoint.id).where(Checkpoint.name == name, Checkpoint.job_id != job.id).limit(1)):
        name = f"{stem.rpartition(':')[0]}:{new_id('x')[-8:]}{marker}"
    return name


def row(session: Session, is_visible: ColumnElement[bool], name: str, *, locked: bool = False) -> Checkpoint | None:
    """Return the checkpoint with this name or id if `is_visible` holds, which may refer to Job too."""
    matches = Checkpoint.id == name if name.startswith(ID_PREFIX) else Checkpoint.name == name
    found = select(Checkpoint).join(Job, Job.id == Checkpoint.job_id).where(matches, is_visible)
    return session.scalar(found.with_for_update(of=Checkpoint) if locked else found)


def as_adapter(
    session: Session, checkpoint: Checkpoint, *, reader: str | None = None, param: str | None = None
) -> Adapter:
    """Represent the checkpoint as an Adapter, which is not stored. reader: id of the project that reads it; None: an
    operator. Raises NoLongerKept."""
    job = session.get_one(Job, checkpoint.job_id)
    if checkpoint.adapter is None or checkpoint.lineage is None:
        if reader in (None, job.project_id):
            raise NoLongerKept("own_checkpoint_expired", checkpoint=checkpoint.name, job=job.id, param=param)
        raise NoLongerKept("shared_checkpoint_expired", checkpoint=checkpoint.name, param=param)
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
    """Return the step of a checkpoint's adapter, or None for a job's final adapter."""
    return int(adapter.name.rpartition(MARK)[2]) if adapter.id.startswith(ID_PREFIX) else None


def kept() -> Select[Checkpoint, Job]:
    """Checkpoints that can be used as models, with their jobs."""
    return select(Checkpoint, Job).join(Job, Job.id == Checkpoint.job_id).where(Checkpoint.adapter.is_not(None))


def is_continued() -> ColumnElement[bool]:
    """Condition for checkpoints that an unfinished job continues. Each of its attempts reads their files."""
    child = Job.__table__.alias("child")
    return exists().where(child.c.parent_adapter == Checkpoint.id, child.c.state.in_(UNFINISHED_STATES))


def assign(
    session: Session, checkpoint: Checkpoint, field: Literal["artifact", "adapter"], digest: str | None, *, now: float
) -> None:
    """Set the files from which a job resumes (`artifact`), or the weights as a model (`adapter`), of a locked row.

    Charges the difference in stored bytes to the job's project.
    """
    before: str | None = getattr(checkpoint, field)
    if digest != before:
        project_id = session.get_one(Job, checkpoint.job_id).project_id
        difference = _num_bytes(session, digest) - _num_bytes(session, before)
        ledger.store(session, project_id, difference, now=now)
        setattr(checkpoint, field, digest)


def _num_bytes(session: Session, digest: str | None) -> int:
    return 0 if digest is None else session.get_one(Artifact, digest).num_bytes


def remove_model(session: Session, checkpoint: Checkpoint) -> str | None:
    """Remove the checkpoint's model, unless an unfinished job continues it. Returns the removed digest, or None.

    The lineage record stays if any job has ever continued the checkpoint, because that job's record refers to it.
    """
    session.flush()
    # The submission of a job that continues the checkpoint locks the row until the job is committed.
    session.refresh(checkpoint, with_for_update=True)
    digest = checkpoint.adapter
    if digest is None or session.scalar(select(Checkpoint.id).where(Checkpoint.id == checkpoint.id, is_continued())):
        return None
    assign(session, checkpoint, "adapter", None, now=read_clock(session))
    if session.scalar(select(Job.id).where(Job.parent_adapter == checkpoint.id).limit(1)) is None:
        checkpoint.lineage = checkpoint.lineage_id = None
    return digest


def delete(session: Session, checkpoint: Checkpoint, *, param: str = "model") -> None:
    """Delete the checkpoint's model. The files from which its job resumes stay.

    param: for errors. Raises Conflict while an unfinished job continues it.
    """
    if checkpoint.adapter is not None and remove_model(session, checkpoint) is None:
        project_id = session.get_one(Job, checkpoint.job_id).project_id
        children = unfinished_children(session, checkpoint.id, project_id)
        raise in_use("checkpoint", checkpoint.name, children, project_id, param=param)
    session.flush()


def unfinished_children(session: Session, model_id: str, project_id: str) -> Sequence[Job]:
    """Return the first unfinished jobs that continue the adapter or checkpoint, the project's before those of others:
    at most one more than an error names."""
    found = select(Job).where(Job.parent_adapter == model_id, Job.state.in_(UNFINISHED_STATES))
    own_first = case((Job.project_id == project_id, 0), else_=1)
    return session.scalars(found.order_by(own_first, Job.created_at, Job.id).limit(NUM_NAMED + 1)).all()


def in_use(
    kind: Literal["adapter", "checkpoint"], name: str, children: Sequence[Job], project_id: str, *, param: str
) -> Conflict:
    """Return the error for the deletion of a model that these unfinished jobs continue. Ids of jobs of other projects
    are not named."""
    own = [f"job {child.id}" for child in children if child.project_id == project_id]
    is_one, num_others = len(children) == 1, len(children) - len(own)
    others = ["a job in another project" if num_others == 1 else "jobs in other projects"] if num_others else []
    named = listed([*own[:NUM_NAMED], *(["others"] if len(children) > NUM_NAMED and own else others)])
    if is_one:
        text = "used_by_job" if own else "used_by_foreign_job"
    elif not own:
        text = "used_by_foreign_jobs"
    else:
        text = "used_by_own_and_foreign_jobs" if num_others else "used_by_jobs"
    return Conflict(
        text,
        kind=kind,
        name=name,
        users=named,
        param=param,
    )


def expire(session: Session) -> None:
    """Remove the models of checkpoints whose job no longer keeps them and that no unfinished job continues."""
    due = select(Checkpoint).where(Checkpoint.adapter.is_not(None), Checkpoint.artifact.is_(None))
    for checkpoint in session.scalars(due.order_by(Checkpoint.id)).all():
        remove_model(session, checkpoint)
