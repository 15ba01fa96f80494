"""What a project may use at most."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None
COUNTS = ("max_concurrent_jobs", "max_queued_jobs", "max_jobs_per_day", "max_stored_bytes")


def upgrade() -> None:
    """Without limits, as before."""
    for name in COUNTS:
        op.add_column("projects", sa.Column(name, sa.BigInteger(), nullable=True))
    op.add_column("projects", sa.Column("max_device_hours_per_month", sa.Float(53), nullable=True))


def downgrade() -> None:
    for name in (*COUNTS, "max_device_hours_per_month"):
        op.drop_column("projects", name)
