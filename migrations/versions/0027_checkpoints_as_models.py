"""Checkpoints that can be used as models, and adapters that another project may read."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None

NAMED = """
UPDATE checkpoints SET name = (
    SELECT COALESCE(
        jobs.adapter_name,
        'ft:' || jobs.base_model || ':' || projects.name || ':' || COALESCE(jobs.suffix, '') || ':'
        || SUBSTR(jobs.id, LENGTH(jobs.id) - 7)
    ) || '\\:ckpt-step-' || checkpoints.step
    FROM jobs JOIN projects ON projects.id = jobs.project_id
    WHERE jobs.id = checkpoints.job_id
)
"""


def upgrade() -> None:
    """What was stored before keeps the name that it was told by, and has no adapter."""
    for name in ("name", "adapter", "lineage_id"):
        op.add_column("checkpoints", sa.Column(name, sa.String(255), nullable=True))
    op.add_column("checkpoints", sa.Column("lineage", sa.JSON(), nullable=True))
    op.execute(NAMED)
    op.create_index("ix_checkpoints_name", "checkpoints", ["name"])
    op.create_index("ix_checkpoints_adapter", "checkpoints", ["adapter"])
    op.create_table(
        "model_permissions",
        sa.Column("id", sa.String(255), nullable=False),
        sa.Column("model_id", sa.String(255), nullable=False),
        sa.Column("project_id", sa.String(255), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("created_by", sa.String(255), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_model_permissions_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model_permissions")),
    )
    op.create_index(
        "ix_model_permissions_model_id_project_id", "model_permissions", ["model_id", "project_id"], unique=True
    )
    op.create_index(
        "ix_model_permissions_project_id_created_at_model_id",
        "model_permissions",
        ["project_id", "created_at", "model_id"],
    )


def downgrade() -> None:
    op.drop_table("model_permissions")
    op.drop_index("ix_checkpoints_adapter", table_name="checkpoints")
    op.drop_index("ix_checkpoints_name", table_name="checkpoints")
    for name in ("lineage_id", "lineage", "adapter", "name"):
        op.drop_column("checkpoints", name)
