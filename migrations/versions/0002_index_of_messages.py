"""An index of a job's events that are no metrics: a page of messages does not read past thousands of those."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

NOT_METRICS = sa.text("type <> 'metrics'")


def upgrade() -> None:
    op.create_index(
        "ix_events_messages",
        "events",
        ["job_id", "seq"],
        unique=False,
        sqlite_where=NOT_METRICS,
        postgresql_where=NOT_METRICS,
    )


def downgrade() -> None:
    op.drop_index("ix_events_messages", table_name="events")
