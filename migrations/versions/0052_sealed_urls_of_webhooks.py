"""Webhook URLs are encrypted under the pepper, which a migration does not have.

The API server encrypts those that there are (catalog/webhooks/sealed_urls.py); from then on `url` is what is shown.
On the way down what was encrypted is lost: such endpoints send nothing until their URL is given again.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0052"
down_revision = "0051"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("webhook_endpoints", sa.Column("sealed_url", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("webhook_endpoints", "sealed_url")
