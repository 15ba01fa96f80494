"""Estimated sizes of exports, which count toward the quota of stored bytes.

Revision ID: 0007_export_estimates
Revises: 0006_adapter_exports
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007_export_estimates"
down_revision = "0006_adapter_exports"


def upgrade() -> None:
    op.add_column("adapter_exports", sa.Column("expected_bytes", sa.BigInteger(), server_default="0", nullable=False))


def downgrade() -> None:
    op.drop_column("adapter_exports", "expected_bytes")
