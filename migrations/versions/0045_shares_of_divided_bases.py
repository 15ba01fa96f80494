"""The smallest jobs that wait for a group which divides bases.

Of those prepared before it is not reckoned, and so neither is what of their base can be divided; the api does so at its
start for those that are queued.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0045"
down_revision = "0040"
branch_labels = None
depends_on = None

IN_QUEUE = sa.text("queued_at IS NOT NULL")
SMALLEST = {
    "ix_jobs_smallest_divided": ["project_id", "priority", "least_divided_bytes", "id"],
    "ix_jobs_smallest_divided_alike": ["pack_key", "project_id", "priority", "least_divided_bytes", "id"],
}


def upgrade() -> None:
    op.add_column("jobs", sa.Column("least_divided_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    for name, columns in SMALLEST.items():
        op.create_index(name, "jobs", columns, sqlite_where=IN_QUEUE, postgresql_where=IN_QUEUE)


def downgrade() -> None:
    for name in SMALLEST:
        op.drop_index(name, table_name="jobs")
    op.drop_column("jobs", "least_divided_bytes")
