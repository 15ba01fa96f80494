"""Drops api_keys.request_digest: a repeated creation of a key is recognized by its Idempotency-Key alone.

The way down adds the column again, empty: old code then does not recognize requests that were sent before.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0049"
down_revision = "0048"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_column("api_keys", "request_digest")


def downgrade() -> None:
    op.add_column("api_keys", sa.Column("request_digest", sa.String(255), nullable=True))
