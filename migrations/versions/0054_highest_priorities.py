"""The highest priority of projects and keys, and when a project last had files of each class prepared."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0054"
down_revision = "0053"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("projects", "api_keys"):
        op.add_column(table, sa.Column("highest_priority", sa.Integer(), nullable=False, server_default="1"))
    op.add_column("projects", sa.Column("class_prepared_at", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("projects", "class_prepared_at")
    for table in ("api_keys", "projects"):
        op.drop_column(table, "highest_priority")
