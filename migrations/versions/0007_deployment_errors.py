"""Errors of deployments that only operators see.

Revision ID: 0007_deployment_errors
Revises: 0006_adapter_exports
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007_deployment_errors"
down_revision = "0006_adapter_exports"


def upgrade() -> None:
    op.add_column("deployments", sa.Column("operator_error", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("deployments", "operator_error")
