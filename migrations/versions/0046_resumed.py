"""When a job was last resumed. None of those before it: their attempts count as they did."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0046"
down_revision = "0045"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("resumed_at", sa.Float(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "resumed_at")
