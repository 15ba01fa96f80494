"""Who is asked to leave for an urgent job, and how often he was."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("preempted_for", sa.String(255), nullable=True))
    op.add_column("jobs", sa.Column("num_preemptions", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("room_asked_at", sa.Float(53), nullable=True))
    op.add_column("attempts", sa.Column("preemption", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("attempts", "preemption")
    op.drop_column("jobs", "room_asked_at")
    op.drop_column("jobs", "num_preemptions")
    op.drop_column("jobs", "preempted_for")
