"""Data reports: the results of preparing a file, for callers that may read the file or the job."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from catalog.db.database import Database
from catalog.history import queries
from catalog.registry import base_models
from catalog.storage import files
from catalog.tables.jobs import Job
from catalog.tables.storage import Prepared
from catalog.tables.table import Json


@dataclass(frozen=True, kw_only=True, slots=True)
class JobReports:
    """The data reports of a job; None for a file that does not exist or is not prepared yet."""

    training: Json | None
    validation: Json | None


def of_job(db: Database, *, project_id: str, job_id: str) -> JobReports:
    with db.read() as session:
        job = queries.find(session, project_id, job_id)
        return JobReports(
            training=_report(session, job.train_prepared), validation=_report(session, job.valid_prepared)
        )


def of_file(db: Database, *, project_id: str, file_id: str, model: str) -> Json | None:
    """Return the file's report from the project's latest job on `model` that has one; None if there is none.

    Only the latest 20 jobs that use the file are examined.
    """
    with db.read() as session:
        files.find(session, project_id=project_id, file_id=file_id)
        base_models.find(session, model)
        reads_it = or_(Job.training_file == file_id, Job.validation_file == file_id)
        jobs = select(Job).where(Job.project_id == project_id, Job.base_model == model, reads_it)
        for job in session.scalars(jobs.order_by(Job.created_at.desc()).limit(20)):
            key = job.train_prepared if file_id == job.training_file else job.valid_prepared
            report = _report(session, key)
            if report is not None:
                return report
    return None


def _report(session: Session, key: str | None) -> Json | None:
    prepared = session.get(Prepared, key) if key else None
    return prepared.report if prepared else None
