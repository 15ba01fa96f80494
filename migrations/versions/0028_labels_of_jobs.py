"""Tags of jobs, and an index of what people find their jobs by."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import sqlalchemy as sa
from alembic import context, op

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None

AT_ONCE = 1000


def upgrade() -> None:
    op.add_column("jobs", sa.Column("tags", sa.JSON(), nullable=True))
    job_labels = op.create_table(
        "job_labels",
        sa.Column("job_id", sa.String(255), nullable=False),
        sa.Column("label", sa.String(64), nullable=False),
        sa.Column("project_id", sa.String(255), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_labels_job_id_jobs")),
        sa.PrimaryKeyConstraint("job_id", "label", name=op.f("pk_job_labels")),
    )
    columns = ["project_id", "label", "created_at", "job_id"]
    op.create_index("ix_job_labels_project_id_label_created_at_job_id", "job_labels", columns)
    bare = sa.text("CAST(labels AS TEXT) IN ('null', '{}')")
    keys = ["project_id", "created_at", "id"]
    op.create_index("ix_jobs_without_metadata", "jobs", keys, sqlite_where=bare, postgresql_where=bare)
    if not context.is_offline_mode():  # else there is nothing to read
        _note_metadata(job_labels)


def downgrade() -> None:
    op.drop_index("ix_jobs_without_metadata", table_name="jobs")
    op.drop_table("job_labels")
    op.drop_column("jobs", "tags")


def _note_metadata(job_labels: sa.Table) -> None:
    """That of the jobs that there are, some at a time."""
    plain = (sa.column("id", sa.String), sa.column("project_id", sa.String), sa.column("created_at", sa.Float))
    jobs = sa.table("jobs", *plain, sa.column("labels", sa.JSON))
    connection, last = op.get_bind(), ""
    while rows := connection.execute(sa.select(jobs).where(jobs.c.id > last).order_by(jobs.c.id).limit(AT_ONCE)).all():
        last = rows[-1].id
        labels = [label for row in rows for label in _labels(row)]
        if labels:
            connection.execute(job_labels.insert(), labels)


def _labels(row: Any) -> list[dict[str, Any]]:
    shared = {"job_id": row.id, "project_id": row.project_id, "created_at": row.created_at}
    pairs: dict[str, str] = row.labels or {}
    return [
        {**shared, "label": hashlib.sha256(json.dumps(["metadata", key, value]).encode()).hexdigest()}
        for key, value in pairs.items()
    ]
