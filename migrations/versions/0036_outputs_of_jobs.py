"""What trainers printed for each attempt."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0036"
down_revision = "0035"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "job_outputs",
        sa.Column("claim_id", sa.String(255), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.String(255), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(255), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("written_at", sa.Float(53), nullable=False),
        sa.ForeignKeyConstraint(["claim_id"], ["attempts.claim_id"], name=op.f("fk_job_outputs_claim_id_attempts")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_outputs_job_id_jobs")),
        sa.PrimaryKeyConstraint("claim_id", "rank", name=op.f("pk_job_outputs")),
    )
    op.create_index(op.f("ix_job_outputs_job_id"), "job_outputs", ["job_id"])


def downgrade() -> None:
    op.drop_index(op.f("ix_job_outputs_job_id"), "job_outputs")
    op.drop_table("job_outputs")
