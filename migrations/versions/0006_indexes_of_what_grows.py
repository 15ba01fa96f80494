"""Indexes of what is asked for in tables that grow: who shares an artifact, a trainer or the bytes of a file."""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

INDEXES = (
    ("files", ["project_id", "digest"]),
    ("attempts", ["trainer_id"]),
    ("checkpoints", ["artifact"]),
    ("prepared", ["artifact"]),
    ("adapters", ["artifact"]),
)


def upgrade() -> None:
    for table, columns in INDEXES:
        op.create_index(_name(table, columns), table, columns)


def downgrade() -> None:
    for table, columns in reversed(INDEXES):
        op.drop_index(_name(table, columns), table_name=table)


def _name(table: str, columns: list[str]) -> str:
    return f"ix_{table}_{'_'.join(columns)}"
