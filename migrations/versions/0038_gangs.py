"""Workers of several nodes that train as one device group, and whose doing the end of an attempt may be."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0038"
down_revision = "0037"
branch_labels = None
depends_on = None

BLAMED = sa.text("blamed_worker_id IS NOT NULL")


def upgrade() -> None:
    op.create_table(
        "gangs",
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("leader_id", sa.String(255), nullable=True),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("min_size", sa.Integer(), nullable=False),
        sa.Column("round_id", sa.String(255), nullable=True),
        sa.Column("task", sa.JSON(), nullable=True),
        sa.Column("expires_at", sa.Float(53), nullable=True),
        sa.Column("port", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_gangs")),
    )
    op.create_table(
        "gang_seats",
        sa.Column("worker_id", sa.String(255), nullable=False),
        sa.Column("gang", sa.String(255), nullable=False),
        sa.Column("kind", sa.String(255), nullable=False),
        sa.Column("num_processes", sa.Integer(), nullable=False),
        sa.Column("versions", sa.String(255), nullable=False),
        sa.Column("free_bytes", sa.BigInteger(), nullable=False),
        sa.Column("round_id", sa.String(255), nullable=True),
        sa.Column("first_rank", sa.Integer(), nullable=True),
        sa.Column("joined_at", sa.Float(53), nullable=True),
        sa.Column("is_leaving", sa.Boolean(), nullable=False),
        sa.Column("num_missed", sa.Integer(), nullable=False),
        sa.Column("ended", sa.JSON(), nullable=True),
        sa.PrimaryKeyConstraint("worker_id", name=op.f("pk_gang_seats")),
    )
    op.create_index(op.f("ix_gang_seats_gang"), "gang_seats", ["gang"])
    op.add_column("attempts", sa.Column("blamed_worker_id", sa.String(255), nullable=True))
    op.create_index(
        "ix_attempts_blamed",
        "attempts",
        ["blamed_worker_id", "ended_at"],
        sqlite_where=BLAMED,
        postgresql_where=BLAMED,
    )


def downgrade() -> None:
    op.drop_index("ix_attempts_blamed", "attempts")
    op.drop_column("attempts", "blamed_worker_id")
    op.drop_index(op.f("ix_gang_seats_gang"), "gang_seats")
    op.drop_table("gang_seats")
    op.drop_table("gangs")
