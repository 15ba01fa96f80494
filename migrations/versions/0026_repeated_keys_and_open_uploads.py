"""Which request made a key, who completes an upload, and indexes of open uploads and of files that expire."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None
OPEN = sa.text("file_id IS NULL AND cancelled_at IS NULL")
EXPIRING = sa.text("expires_at IS NOT NULL")


def upgrade() -> None:
    for name in ("idempotency_key", "request_digest"):
        op.add_column("api_keys", sa.Column(name, sa.String(255), nullable=True))
    op.create_index("ix_api_keys_created_by_created_at", "api_keys", ["created_by", "created_at"])
    op.add_column("uploads", sa.Column("completing_until", sa.Float(53), nullable=True))
    op.create_index(
        "ix_uploads_open", "uploads", ["project_id", "expires_at"], sqlite_where=OPEN, postgresql_where=OPEN
    )
    op.create_index("ix_files_expiring", "files", ["expires_at"], sqlite_where=EXPIRING, postgresql_where=EXPIRING)


def downgrade() -> None:
    op.drop_index("ix_files_expiring", table_name="files")
    op.drop_index("ix_uploads_open", table_name="uploads")
    op.drop_column("uploads", "completing_until")
    op.drop_index("ix_api_keys_created_by_created_at", table_name="api_keys")
    for name in ("request_digest", "idempotency_key"):
        op.drop_column("api_keys", name)
