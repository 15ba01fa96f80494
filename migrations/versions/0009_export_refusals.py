"""Workers that have too little disk space or memory for an export.

Revision ID: 0009_export_refusals
Revises: 0008_export_estimates
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009_export_refusals"
down_revision = "0008_export_estimates"


def upgrade() -> None:
    op.add_column("adapter_exports", sa.Column("refusals", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("adapter_exports", "refusals")
