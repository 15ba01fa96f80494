"""Plans of jobs, with what a person is shown of prepared files and of two of them beside each other."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Files that were prepared before have no details: they are prepared again for the first plan that reads them."""
    op.add_column("prepared", sa.Column("details", sa.JSON(), nullable=True))
    op.create_table(
        "plans",
        sa.Column("id", sa.String(255), nullable=False),
        sa.Column("project_id", sa.String(255), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("created_by", sa.String(255), nullable=False),
        sa.Column("expires_at", sa.Float(53), nullable=False),
        sa.Column("state", sa.String(255), nullable=False),
        sa.Column("base_model", sa.String(255), nullable=False),
        sa.Column("base_digest", sa.String(255), nullable=False),
        sa.Column("requested", sa.JSON(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("training_file", sa.String(255), nullable=False),
        sa.Column("validation_file", sa.String(255), nullable=True),
        sa.Column("train_prepared", sa.String(255), nullable=False),
        sa.Column("valid_prepared", sa.String(255), nullable=True),
        sa.Column("found", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("error", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("claim_id", sa.String(255), nullable=True),
        sa.Column("lease_expires_at", sa.Float(53), nullable=True),
        sa.Column("num_lost", sa.BigInteger(), nullable=False),
        sa.Column("run_after", sa.Float(53), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name="fk_plans_project_id_projects"),
        sa.ForeignKeyConstraint(["base_model"], ["base_models.name"], name="fk_plans_base_model_base_models"),
        sa.ForeignKeyConstraint(["training_file"], ["files.id"], name="fk_plans_training_file_files"),
        sa.ForeignKeyConstraint(["validation_file"], ["files.id"], name="fk_plans_validation_file_files"),
        sa.PrimaryKeyConstraint("id", name="pk_plans"),
        sa.UniqueConstraint("claim_id", name="uq_plans_claim_id"),
    )
    op.create_index("ix_plans_project_id_created_at_id", "plans", ["project_id", "created_at", "id"])
    op.create_index("ix_plans_state_created_at", "plans", ["state", "created_at"])
    op.create_index("ix_plans_expires_at", "plans", ["expires_at"])
    op.create_table(
        "file_overlaps",
        sa.Column("train_key", sa.String(255), nullable=False),
        sa.Column("valid_key", sa.String(255), nullable=False),
        sa.Column("num_rows", sa.BigInteger(), nullable=False),
        sa.Column("of_rows", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("train_key", "valid_key", name="pk_file_overlaps"),
    )
    op.create_index("ix_trainers_pack_key_started_at", "trainers", ["pack_key", "started_at"])


def downgrade() -> None:
    op.drop_index("ix_trainers_pack_key_started_at", table_name="trainers")
    op.drop_table("file_overlaps")
    op.drop_table("plans")
    op.drop_column("prepared", "details")
