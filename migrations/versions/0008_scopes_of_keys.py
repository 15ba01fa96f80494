"""What a key may do, how it is told from others, and which key took its place; when a project was put away.

Keys of before can do all that they could: no scopes means all.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("scopes", sa.JSON(), nullable=True))
    op.add_column("api_keys", sa.Column("ending", sa.String(length=255), nullable=True))
    op.add_column("api_keys", sa.Column("replaced_by", sa.String(length=255), nullable=True))
    op.create_index("ix_api_keys_project_id_created_at_id", "api_keys", ["project_id", "created_at", "id"])
    op.add_column("projects", sa.Column("archived_at", sa.Float(precision=53), nullable=True))


def downgrade() -> None:
    """A key that could do less would be able to do everything: those go, as do the keys of archived projects."""
    op.execute(
        "update api_keys set revoked_at = created_at where revoked_at is null and (scopes is not null or "
        "project_id in (select id from projects where archived_at is not null))"
    )
    op.drop_column("projects", "archived_at")
    op.drop_index("ix_api_keys_project_id_created_at_id", table_name="api_keys")
    for name in ("replaced_by", "ending", "scopes"):
        op.drop_column("api_keys", name)
