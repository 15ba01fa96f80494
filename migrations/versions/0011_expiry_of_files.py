"""When a file goes by itself; those of before stay until somebody deletes them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("files", sa.Column("expires_at", sa.Float(precision=53), nullable=True))


def downgrade() -> None:
    op.drop_column("files", "expires_at")
