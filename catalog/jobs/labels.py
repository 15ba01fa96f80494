"""What people find their jobs by: pairs of `metadata` and `tags`, each kept by its digest in an index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from sqlalchemy import Select, select
from sqlalchemy.orm import Session, aliased

from catalog.tables import Job, JobLabel

MAX_TAGS = 16


def digests(metadata: Mapping[str, str], tags: Sequence[str]) -> list[str]:
    """One for each label: equal for equal ones, whichever job has them."""
    labels = [["metadata", key, value] for key, value in metadata.items()]
    labels += [["tag", tag] for tag in tags]
    return list(dict.fromkeys(hashlib.sha256(json.dumps(label).encode()).hexdigest() for label in labels))


def note(session: Session, job: Job) -> None:
    """Put the labels of a new job, whose row is stored, into the index."""
    for label in digests(job.labels or {}, job.tags or []):
        session.add(JobLabel(job_id=job.id, label=label, project_id=job.project_id, created_at=job.created_at))


def jobs_with(project_id: str, wanted: Sequence[str]) -> Select[Job]:
    """The project's jobs that have all these labels, found by the first."""
    first, *others = wanted
    found = select(Job).join(JobLabel, JobLabel.job_id == Job.id)
    found = found.where(JobLabel.project_id == project_id, JobLabel.label == first)
    for label in others:
        other = aliased(JobLabel)
        found = found.where(select(other.job_id).where(other.job_id == Job.id, other.label == label).exists())
    return found
