"""The adapter that a job continues; none did so far."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("parent_adapter", sa.String(length=255), nullable=True))
    op.create_index("ix_jobs_parent_adapter", "jobs", ["parent_adapter"])


def downgrade() -> None:
    op.drop_index("ix_jobs_parent_adapter", table_name="jobs")
    op.drop_column("jobs", "parent_adapter")
