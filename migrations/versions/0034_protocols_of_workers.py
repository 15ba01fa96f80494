"""What the service takes of workers, and which protocol each speaks."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0034"
down_revision = "0033"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "service",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("oldest_protocol", sa.Integer(), nullable=False),
        sa.Column("newest_protocol", sa.Integer(), nullable=False),
        sa.Column("version", sa.String(255), nullable=False),
        sa.Column("announced_at", sa.Float(53), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_service")),
    )
    op.add_column("workers", sa.Column("protocol", sa.Integer(), nullable=True))


def downgrade() -> None:
    op.drop_column("workers", "protocol")
    op.drop_table("service")
