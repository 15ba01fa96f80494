"""What projects use, by day; and the bytes that each has stored."""

from __future__ import annotations

import time

import sqlalchemy as sa
from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None
STORED = """
insert into stored_bytes (project_id, num_bytes)
select project_id, sum(num_bytes) from (
    select project_id, num_bytes from files where deleted_at is null
    union all
    select adapters.project_id, artifacts.num_bytes from adapters
    join artifacts on artifacts.digest = adapters.artifact where adapters.deleted_at is null
) as held group by project_id
"""


def upgrade() -> None:
    """What was used before is not told by day; the bytes that are there are counted, from today on."""
    amounts = ("trained_tokens", "num_created", "num_succeeded", "num_failed", "num_cancelled")
    op.create_table(
        "usage_days",
        sa.Column("project_id", sa.String(255), nullable=False),
        sa.Column("day", sa.Integer(), nullable=False),
        sa.Column("base_model", sa.String(255), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("device_seconds", sa.Float(53), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in amounts),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_usage_days_project_id_projects")),
        sa.PrimaryKeyConstraint("project_id", "day", "base_model", "slot", name=op.f("pk_usage_days")),
    )
    op.create_index("ix_usage_days_day", "usage_days", ["day"])
    op.create_table(
        "usage_months",
        sa.Column("project_id", sa.String(255), nullable=False),
        sa.Column("month", sa.Integer(), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("device_seconds", sa.Float(53), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_usage_months_project_id_projects")),
        sa.PrimaryKeyConstraint("project_id", "month", "slot", name=op.f("pk_usage_months")),
    )
    op.create_table(
        "stored_days",
        sa.Column("project_id", sa.String(255), nullable=False),
        sa.Column("day", sa.Integer(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_stored_days_project_id_projects")),
        sa.PrimaryKeyConstraint("project_id", "day", name=op.f("pk_stored_days")),
    )
    op.create_table(
        "stored_bytes",
        sa.Column("project_id", sa.String(255), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_stored_bytes_project_id_projects")),
        sa.PrimaryKeyConstraint("project_id", name=op.f("pk_stored_bytes")),
    )
    op.execute(sa.text(STORED))
    today = int(time.time() // 86_400)
    copied = "insert into stored_days (project_id, day, num_bytes) select project_id, :day, num_bytes from stored_bytes"
    op.execute(sa.text(copied).bindparams(day=today))


def downgrade() -> None:
    for name in ("stored_bytes", "stored_days", "usage_months", "usage_days"):
        op.drop_table(name)
