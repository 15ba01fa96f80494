"""Where jobs' curves are written beside the record. Going down forgets how far that has got."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "job_exports",
        sa.Column("job_id", sa.String(255), nullable=False),
        sa.Column("type", sa.String(32), nullable=False),
        sa.Column("run_id", sa.String(255), nullable=True),
        sa.Column("train_step", sa.BigInteger(), nullable=False),
        sa.Column("valid_step", sa.BigInteger(), nullable=False),
        sa.Column("next_at", sa.Float(53), nullable=True),
        sa.Column("claim_id", sa.String(255), nullable=True),
        sa.Column("num_failures", sa.Integer(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("finished_at", sa.Float(53), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_exports_job_id_jobs"),
        sa.PrimaryKeyConstraint("job_id", "type", name="pk_job_exports"),
    )
    is_due = sa.text("next_at IS NOT NULL")
    op.create_index("ix_job_exports_due", "job_exports", ["next_at"], sqlite_where=is_due, postgresql_where=is_due)
    op.add_column("workers", sa.Column("integrations", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("workers", "integrations")
    op.drop_table("job_exports")
