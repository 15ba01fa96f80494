"""Estimated sizes of exports, which count toward the quota of stored bytes.

Revision ID: 0008_export_estimates
Revises: 0007_deployment_errors
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008_export_estimates"
down_revision = "0007_deployment_errors"


def upgrade() -> None:
    op.add_column("adapter_exports", sa.Column("expected_bytes", sa.BigInteger(), server_default="0", nullable=False))


def downgrade() -> None:
    op.drop_column("adapter_exports", "expected_bytes")
