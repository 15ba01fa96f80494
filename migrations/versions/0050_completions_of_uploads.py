"""How often an upload was completed: a rejected completion may be repeated a limited number of times."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0050"
down_revision = "0049"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("uploads", sa.Column("num_completions", sa.BigInteger(), server_default="0", nullable=False))


def downgrade() -> None:
    op.drop_column("uploads", "num_completions")
