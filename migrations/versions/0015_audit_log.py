"""The audit log, and who made keys and projects."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None
UNSEALED = sa.text("link IS NULL")


def upgrade() -> None:
    """The log begins now; who made the keys and projects of before is not known."""
    op.create_table(
        "audit_events",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False, autoincrement=True),
        sa.Column("id", sa.String(255), nullable=False),
        sa.Column("type", sa.String(255), nullable=False),
        sa.Column("effective_at", sa.Float(53), nullable=False),
        sa.Column("project_id", sa.String(255), nullable=True),
        sa.Column("object_id", sa.String(255), nullable=True),
        sa.Column("actor_type", sa.String(255), nullable=False),
        sa.Column("actor_id", sa.String(255), nullable=True),
        sa.Column("actor_name", sa.String(255), nullable=True),
        sa.Column("request_id", sa.String(255), nullable=True),
        sa.Column("address", sa.String(255), nullable=True),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.Column("link", sa.BigInteger(), nullable=True),
        sa.Column("previous", sa.String(255), nullable=True),
        sa.Column("digest", sa.String(255), nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_audit_events")),
        sa.UniqueConstraint("id", name=op.f("uq_audit_events_id")),
        sa.UniqueConstraint("link", name=op.f("uq_audit_events_link")),
    )
    for first in ("", "project_id", "actor_id", "type"):
        columns = [name for name in (first, "effective_at", "id") if name]
        op.create_index(f"ix_audit_events_{'_'.join(columns)}", "audit_events", columns)
    op.create_index(
        "ix_audit_events_unsealed", "audit_events", ["seq"], sqlite_where=UNSEALED, postgresql_where=UNSEALED
    )
    op.create_table(
        "audit_head",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("link", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(255), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_head")),
    )
    op.add_column("projects", sa.Column("created_by", sa.String(255), nullable=True))
    op.add_column("api_keys", sa.Column("created_by", sa.String(255), nullable=True))


def downgrade() -> None:
    op.drop_column("api_keys", "created_by")
    op.drop_column("projects", "created_by")
    op.drop_table("audit_head")
    op.drop_table("audit_events")
