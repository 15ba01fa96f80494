"""Serving endpoints, and deployments of adapters on them.

Revision ID: 0005_serving
Revises: 0004_reproduction
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005_serving"
down_revision = "0004_reproduction"


def upgrade() -> None:
    op.create_table(
        "serving_endpoints",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("kind", sa.String(length=255), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("base_model", sa.String(length=255), nullable=False),
        sa.Column("base_digest", sa.String(length=255), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("sealed_key", sa.Text(), nullable=True),
        sa.Column("adapter_folder", sa.Text(), nullable=False),
        sa.Column("max_rank", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=255), nullable=False),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("served_model", sa.Text(), nullable=True),
        sa.Column("served_root", sa.Text(), nullable=True),
        sa.Column("reference", sa.JSON(), nullable=True),
        sa.Column("verification", sa.JSON(), nullable=True),
        sa.Column("checked_at", sa.Float(precision=53), nullable=True),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("deleted_at", sa.Float(precision=53), nullable=True),
        sa.Column("claim_id", sa.String(length=255), nullable=True),
        sa.Column("lease_expires_at", sa.Float(precision=53), nullable=True),
        sa.ForeignKeyConstraint(
            ["base_model"], ["base_models.name"], name=op.f("fk_serving_endpoints_base_model_base_models")
        ),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_serving_endpoints_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_serving_endpoints")),
        sa.UniqueConstraint("claim_id", name=op.f("uq_serving_endpoints_claim_id")),
        sa.UniqueConstraint("name", name=op.f("uq_serving_endpoints_name")),
    )
    op.create_table(
        "deployments",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("endpoint_id", sa.String(length=255), nullable=False),
        sa.Column("adapter_id", sa.String(length=255), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("state", sa.String(length=255), nullable=False),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("reference", sa.JSON(), nullable=True),
        sa.Column("verification", sa.JSON(), nullable=True),
        sa.Column("num_failures", sa.Integer(), nullable=False),
        sa.Column("next_try_at", sa.Float(precision=53), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("updated_at", sa.Float(precision=53), nullable=False),
        sa.ForeignKeyConstraint(
            ["endpoint_id"], ["serving_endpoints.id"], name=op.f("fk_deployments_endpoint_id_serving_endpoints")
        ),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name=op.f("fk_deployments_adapter_id_adapters")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_deployments_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deployments")),
    )
    op.create_index(
        op.f("ix_deployments_endpoint_id_adapter_id"), "deployments", ["endpoint_id", "adapter_id"], unique=True
    )
    op.create_index(op.f("ix_deployments_adapter_id"), "deployments", ["adapter_id"])
    op.create_index(op.f("ix_deployments_project_id"), "deployments", ["project_id"])


def downgrade() -> None:
    op.drop_table("deployments")
    op.drop_table("serving_endpoints")
