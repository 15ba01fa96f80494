"""Numbers of the whole fleet that are kept as they change, and an index of who waits longest in each class."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0033"
down_revision = "0032"
branch_labels = None
depends_on = None

IN_QUEUE = sa.text("queued_at IS NOT NULL")
COUNTED = """
insert into tallies (name, label, slot, number)
select 'jobs', state || ' ' || cast(priority as varchar(12)), 0, count(*) from jobs
where length(state) < 32 group by state, priority
union all select 'claims', '', 0, count(*) from attempts
union all select 'attempts_ended', reason, 0, count(*) from attempts
where ended_at is not null and length(reason) < 65 group by reason
union all select 'trained_tokens', '', 0, coalesce(sum(trained_tokens), 0) from jobs where state = 'succeeded'
union all select 'adapters', '', 0, count(*) from adapters where deleted_at is null
"""


def upgrade() -> None:
    """What there is is counted once; leases that expired before are not known."""
    op.create_table(
        "tallies",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("label", sa.String(64), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", "label", "slot", name=op.f("pk_tallies")),
    )
    op.execute(sa.text(COUNTED))
    op.create_index(
        "ix_jobs_waiting", "jobs", ["priority", "queued_at"], sqlite_where=IN_QUEUE, postgresql_where=IN_QUEUE
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_waiting", "jobs")
    op.drop_table("tallies")
