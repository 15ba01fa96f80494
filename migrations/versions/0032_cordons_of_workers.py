"""Workers that take nothing new, and an index of what ended on a worker, by which the service cordons one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0032"
down_revision = "0031"
branch_labels = None
depends_on = None

ENDED = sa.text("ended_at IS NOT NULL")


def upgrade() -> None:
    op.add_column("workers", sa.Column("cordon", sa.JSON(), nullable=True))
    op.add_column("workers", sa.Column("uncordoned_at", sa.Float(53), nullable=True))
    columns = ["worker_id", "ended_at"]
    op.create_index("ix_attempts_ended", "attempts", columns, sqlite_where=ENDED, postgresql_where=ENDED)


def downgrade() -> None:
    op.drop_index("ix_attempts_ended", "attempts")
    op.drop_column("workers", "uncordoned_at")
    op.drop_column("workers", "cordon")
