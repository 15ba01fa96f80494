"""Bytes in the parts of uploads, counted until they are cleaned, and an index of deleted files."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0029"
down_revision = "0028"
branch_labels = None
depends_on = None
OPEN = sa.text("file_id IS NULL AND cancelled_at IS NULL")
COUNTED = sa.text("(part_bytes > 0 OR (file_id IS NULL AND cancelled_at IS NULL))")
DELETED = sa.text("deleted_at IS NOT NULL")


def upgrade() -> None:
    op.add_column("uploads", sa.Column("part_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    uploads = sa.table("uploads", *map(sa.column, ("id", "file_id", "part_bytes")))
    parts = sa.table("upload_parts", *map(sa.column, ("upload_id", "num_bytes")))
    held = sa.select(sa.func.coalesce(sa.func.sum(parts.c.num_bytes), 0)).where(parts.c.upload_id == uploads.c.id)
    op.execute(uploads.update().values(part_bytes=held.scalar_subquery()).where(uploads.c.file_id.is_(None)))
    op.drop_index("ix_uploads_open", table_name="uploads")
    op.create_index("ix_uploads_counted", "uploads", ["project_id"], sqlite_where=COUNTED, postgresql_where=COUNTED)
    op.create_index(
        "ix_files_deleted", "files", ["project_id", "deleted_at"], sqlite_where=DELETED, postgresql_where=DELETED
    )


def downgrade() -> None:
    op.drop_index("ix_files_deleted", table_name="files")
    op.drop_index("ix_uploads_counted", table_name="uploads")
    op.create_index(
        "ix_uploads_open", "uploads", ["project_id", "expires_at"], sqlite_where=OPEN, postgresql_where=OPEN
    )
    op.drop_column("uploads", "part_bytes")
