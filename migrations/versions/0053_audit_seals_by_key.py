"""Clear the seals of the audit log, which were digests without a key: the API servers seal every event again, under
theirs. Downgraded, the code of before does the same with its own digests."""

from __future__ import annotations

from alembic import op

revision = "0053"
down_revision = "0052"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _clear()


def downgrade() -> None:
    _clear()


def _clear() -> None:
    op.execute("UPDATE audit_events SET link = NULL, previous = NULL, digest = NULL WHERE link IS NOT NULL")
    op.execute("DELETE FROM audit_head")
