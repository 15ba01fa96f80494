"""The queue is read by its heads: when a job came into it, what it needs, and indexes by project and class.

What a job that waits already needs is reckoned where it is met; the next to be prepared keeps it on its row.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

BYTES = ("own_bytes", "saved_bytes", "trainer_bytes", "slice_bytes")
IN_QUEUE = sa.text("queued_at IS NOT NULL")


def upgrade() -> None:
    for name in BYTES:
        op.add_column("jobs", sa.Column(name, sa.BigInteger(), nullable=True))
    op.add_column("jobs", sa.Column("queued_at", sa.Float(53), nullable=True))
    op.add_column("projects", sa.Column("preparing_at", sa.Float(53), nullable=True))
    _date_those_that_wait()
    op.drop_index("ix_jobs_state_priority_created_at", table_name="jobs")
    op.create_index("ix_jobs_heads", "jobs", ["state", "project_id", "priority", "created_at", "id"])
    alike = ["pack_key", "project_id", "priority", "created_at", "id"]
    op.create_index("ix_jobs_alike", "jobs", alike, sqlite_where=IN_QUEUE, postgresql_where=IN_QUEUE)


def _date_those_that_wait() -> None:
    """By the last event that says so; a job without one waits since it was made."""
    jobs = sa.table("jobs", *map(sa.column, ("id", "state", "created_at", "queued_at")))
    kept = ("job_id", "type", "created_at")
    events = sa.table("events", *map(sa.column, kept), sa.column("data", sa.JSON()))
    moved = sa.and_(events.c.job_id == jobs.c.id, events.c.type == "transition")
    came = sa.select(sa.func.max(events.c.created_at)).where(moved, events.c.data["to"].as_string() == "queued")
    since = sa.func.coalesce(came.scalar_subquery(), jobs.c.created_at)
    op.execute(jobs.update().where(jobs.c.state == "queued").values(queued_at=since))


def downgrade() -> None:
    op.drop_index("ix_jobs_alike", table_name="jobs")
    op.drop_index("ix_jobs_heads", table_name="jobs")
    op.create_index("ix_jobs_state_priority_created_at", "jobs", ["state", "priority", "created_at"])
    op.drop_column("projects", "preparing_at")
    op.drop_column("jobs", "queued_at")
    for name in reversed(BYTES):
        op.drop_column("jobs", name)
