"""How often a key may ask, and how many jobs it may create: none so far had limits of its own."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("requests_per_minute", "jobs_per_day"):
        op.add_column("api_keys", sa.Column(name, sa.BigInteger(), nullable=True))


def downgrade() -> None:
    for name in ("jobs_per_day", "requests_per_minute"):
        op.drop_column("api_keys", name)
