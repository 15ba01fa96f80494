"""Weighted fair shares: what each project has used of devices, its weight, when each class of it was served last."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Nothing was charged before; of a job that trains the charge begins with its next heartbeat."""
    op.create_table(
        "project_usage",
        sa.Column("project_id", sa.String(255), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("device_seconds", sa.Float(53), nullable=False),
        sa.Column("as_of", sa.Float(53), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_project_usage_project_id_projects")),
        sa.PrimaryKeyConstraint("project_id", "slot", name=op.f("pk_project_usage")),
    )
    op.add_column("projects", sa.Column("weight", sa.Float(53), nullable=False, server_default="1"))
    op.add_column("jobs", sa.Column("claimed_at", sa.Float(53), nullable=True))
    op.add_column("jobs", sa.Column("charged_at", sa.Float(53), nullable=True))
    op.add_column("jobs", sa.Column("device_seconds", sa.Float(53), nullable=False, server_default="0"))
    op.create_index("ix_jobs_priority_claimed_at", "jobs", ["priority", "claimed_at"])


def downgrade() -> None:
    op.drop_index("ix_jobs_priority_claimed_at", table_name="jobs")
    op.drop_column("jobs", "device_seconds")
    op.drop_column("jobs", "charged_at")
    op.drop_column("jobs", "claimed_at")
    op.drop_column("projects", "weight")
    op.drop_table("project_usage")
