"""What of a job's needs the devices of a group can divide among them.

A job that waits already is taken to need all of it whole, until its needs are noted anew.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0037"
down_revision = "0036"
branch_labels = None
depends_on = None

BYTES = ("shardable_bytes", "gathered_bytes")


def upgrade() -> None:
    for name in BYTES:
        op.add_column("jobs", sa.Column(name, sa.BigInteger(), nullable=False, server_default="0"))


def downgrade() -> None:
    for name in reversed(BYTES):
        op.drop_column("jobs", name)
