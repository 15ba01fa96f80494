"""When each worker gave each class its turn, and the smallest of those that wait.

What a job that waits needs is on its row since 0013, save of those that were queued before: the api reckons it at its
start.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

IN_QUEUE = sa.text("queued_at IS NOT NULL")
# The id at the end has SQLite take these indexes though it was analyzed while all jobs were alike.
SMALLEST = {
    "ix_jobs_smallest": ["project_id", "priority", "least_bytes", "id"],
    "ix_jobs_smallest_alike": ["pack_key", "project_id", "priority", "least_bytes", "id"],
}


def upgrade() -> None:
    op.add_column("workers", sa.Column("served_at", sa.JSON(), nullable=True))
    op.add_column("workers", sa.Column("prepared_at", sa.JSON(), nullable=True))
    op.add_column("jobs", sa.Column("least_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.drop_index("ix_jobs_priority_claimed_at", table_name="jobs")
    jobs = sa.table("jobs", *map(sa.column, ("queued_at", "own_bytes", "saved_bytes", "trainer_bytes", "least_bytes")))
    least = sa.func.coalesce(jobs.c.trainer_bytes + jobs.c.own_bytes - jobs.c.saved_bytes, 0)
    op.execute(jobs.update().where(jobs.c.queued_at.is_not(None)).values(least_bytes=least))
    for name, columns in SMALLEST.items():
        op.create_index(name, "jobs", columns, sqlite_where=IN_QUEUE, postgresql_where=IN_QUEUE)


def downgrade() -> None:
    for name in SMALLEST:
        op.drop_index(name, table_name="jobs")
    op.create_index("ix_jobs_priority_claimed_at", "jobs", ["priority", "claimed_at"])
    op.drop_column("jobs", "least_bytes")
    op.drop_column("workers", "prepared_at")
    op.drop_column("workers", "served_at")
