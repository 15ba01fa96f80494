"""What preparation found in a file, for those who may read the file or the job."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from catalog import bases, files, job_records
from catalog.db import Database
from catalog.tables import File, Job, Json, Prepared


@dataclass(frozen=True, kw_only=True, slots=True)
class JobReports:
    """None for a file that there is not, or that is not prepared yet."""

    training: Json | None
    validation: Json | None


def of_job(db: Database, *, project_id: str, job_id: str) -> JobReports:
    with db.read() as session:
        job = job_records.find(session, project_id, job_id)
        return JobReports(
            training=_report(session, job, job.training_file), validation=_report(session, job, job.validation_file)
        )


def of_file(db: Database, *, project_id: str, file_id: str, model: str) -> Json | None:
    """As the latest of the project's jobs on `model` that read the file has it; None where none was prepared."""
    with db.read() as session:
        files.find(session, project_id=project_id, file_id=file_id)
        bases.find(session, model)
        reads_it = or_(Job.training_file == file_id, Job.validation_file == file_id)
        jobs = select(Job).where(Job.project_id == project_id, Job.base_model == model, reads_it)
        for job in session.scalars(jobs.order_by(Job.created_at.desc()).limit(20)):
            report = _report(session, job, file_id)
            if report is not None:
                return report
    return None


def _report(session: Session, job: Job, file_id: str | None) -> Json | None:
    if file_id is None:
        return None
    key = job.train_prepared if file_id == job.training_file else job.valid_prepared
    prepared = session.get(Prepared, key) if key else _refusal(session, file_id)
    return prepared.report if prepared else None


def _refusal(session: Session, file_id: str) -> Prepared | None:
    """A job whose files were refused has no key: the file's own latest refusal is what it was told."""
    file = session.get_one(File, file_id)
    same_bytes = select(Prepared).where(Prepared.file_digest == file.digest, Prepared.artifact.is_(None))
    return session.scalar(same_bytes.order_by(Prepared.created_at.desc()).limit(1))
