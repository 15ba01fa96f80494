"""How often a member of a gang could not take part for a reason of its own, apart from how often it was late."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0047"
down_revision = "0046"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("gang_seats", sa.Column("num_failed", sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("gang_seats", "num_failed")
