"""Reproductions of adapters: what a job trains again, and the comparison.

Revision ID: 0004_reproduction
Revises: 0003_batches
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004_reproduction"
down_revision = "0003_batches"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("reproduces", sa.JSON(), nullable=True))
    op.add_column("jobs", sa.Column("reproduction", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "reproduction")
    op.drop_column("jobs", "reproduces")
