"""The file that holds a job's curves; jobs of before have none."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("result_file", sa.String(length=255), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "result_file")
