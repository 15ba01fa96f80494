"""The order of a project's own jobs: places, holds, deadlines."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None

IN_QUEUE = sa.text("queued_at IS NOT NULL")
WITH_DEADLINE = sa.text("deadline IS NOT NULL AND finished_at IS NULL")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("place", sa.Float(53), nullable=False, server_default="0"))
    op.execute(sa.text("UPDATE jobs SET place = created_at"))
    op.add_column("jobs", sa.Column("is_held", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("jobs", sa.Column("deadline", sa.Float(53), nullable=True))
    op.add_column("jobs", sa.Column("needed_start", sa.Float(53), nullable=True))
    op.add_column("jobs", sa.Column("is_told_late", sa.Boolean(), nullable=False, server_default=sa.false()))
    _index(heads=["is_held", "place"], alike="place")
    op.create_index(
        "ix_jobs_deadlines", "jobs", ["deadline"], sqlite_where=WITH_DEADLINE, postgresql_where=WITH_DEADLINE
    )


def _index(*, heads: list[str], alike: str) -> None:
    for name in ("ix_jobs_alike", "ix_jobs_heads"):
        op.drop_index(name, table_name="jobs")
    op.create_index("ix_jobs_heads", "jobs", ["state", "project_id", "priority", *heads, "id"])
    columns = ["pack_key", "project_id", "priority", alike, "id"]
    op.create_index("ix_jobs_alike", "jobs", columns, sqlite_where=IN_QUEUE, postgresql_where=IN_QUEUE)


def downgrade() -> None:
    op.drop_index("ix_jobs_deadlines", table_name="jobs")
    _index(heads=["created_at"], alike="created_at")
    for name in ("is_told_late", "needed_start", "deadline", "is_held", "place"):
        op.drop_column("jobs", name)
