"""A checkpoint's numbers are those of the curves at its step: it holds no copy of them any more."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_column("checkpoints", "metrics")


def downgrade() -> None:
    """Empty: a checkpoint of before had the latest numbers, whatever their steps."""
    op.add_column("checkpoints", sa.Column("metrics", sa.JSON(), nullable=False, server_default="{}"))
