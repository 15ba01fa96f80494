"""What learning from pairs of answers adds: the longest example of a job, and the rewards of a step."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("longest_example", sa.BigInteger(), nullable=True))
    op.add_column("metrics", sa.Column("rewards", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("metrics", "rewards")
    op.drop_column("jobs", "longest_example")
