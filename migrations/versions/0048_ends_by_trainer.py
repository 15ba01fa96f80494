"""What a trainer holds, and has held of late, among all that it ever held."""

from __future__ import annotations

from alembic import op

revision = "0048"
down_revision = "0047"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_attempts_trainer_id_ended_at", "attempts", ["trainer_id", "ended_at"])
    op.drop_index("ix_attempts_trainer_id", table_name="attempts")


def downgrade() -> None:
    op.create_index("ix_attempts_trainer_id", "attempts", ["trainer_id"])
    op.drop_index("ix_attempts_trainer_id_ended_at", table_name="attempts")
