"""Exports of adapters.

Revision ID: 0006_adapter_exports
Revises: 0005_serving
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006_adapter_exports"
down_revision = "0005_serving"

INDEXES = (
    ("adapter_artifact",),
    ("adapter_id",),
    ("artifact",),
    ("project_id", "adapter_id", "created_at"),
    ("status", "created_at"),
)


def upgrade() -> None:
    op.create_table(
        "adapter_exports",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("created_by", sa.String(length=255), nullable=False),
        sa.Column("adapter_id", sa.String(length=255), nullable=False),
        sa.Column("adapter_name", sa.String(length=255), nullable=False),
        sa.Column("adapter_artifact", sa.String(length=255), nullable=False),
        sa.Column("base_model", sa.String(length=255), nullable=False),
        sa.Column("base_digest", sa.String(length=255), nullable=False),
        sa.Column("format", sa.String(length=255), nullable=False),
        sa.Column("quantization", sa.String(length=255), nullable=True),
        sa.Column("hub_repository", sa.String(length=255), nullable=True),
        sa.Column("status", sa.String(length=255), nullable=False),
        sa.Column("num_attempts", sa.BigInteger(), nullable=False),
        sa.Column("run_after", sa.Float(precision=53), nullable=True),
        sa.Column("started_at", sa.Float(precision=53), nullable=True),
        sa.Column("finished_at", sa.Float(precision=53), nullable=True),
        sa.Column("error", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("artifact", sa.String(length=255), nullable=True),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("verification", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("cost", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("hub_url", sa.Text(), nullable=True),
        sa.Column("claim_id", sa.String(length=255), nullable=True),
        sa.Column("lease_expires_at", sa.Float(precision=53), nullable=True),
        sa.ForeignKeyConstraint(["artifact"], ["artifacts.digest"], name=op.f("fk_adapter_exports_artifact_artifacts")),
        sa.ForeignKeyConstraint(
            ["base_model"], ["base_models.name"], name=op.f("fk_adapter_exports_base_model_base_models")
        ),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_adapter_exports_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_adapter_exports")),
        sa.UniqueConstraint("claim_id", name=op.f("uq_adapter_exports_claim_id")),
    )
    for columns in INDEXES:
        op.create_index(op.f(f"ix_adapter_exports_{'_'.join(columns)}"), "adapter_exports", [*columns])


def downgrade() -> None:
    op.drop_table("adapter_exports")
