"""Inference requests, and their usage.

Revision ID: 0002_inference
Revises: 0001_first_release
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002_inference"
down_revision = "0001_first_release"

TOKENS = ("num_completions", "prompt_tokens", "completion_tokens")
"""Columns of the daily usage."""


def upgrade() -> None:
    op.create_table(
        "inference_requests",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("expires_at", sa.Float(precision=53), nullable=False),
        sa.Column("base_model", sa.String(length=255), nullable=False),
        sa.Column("base_digest", sa.String(length=255), nullable=False),
        sa.Column("pack_key", sa.String(length=255), nullable=False),
        sa.Column("adapter", sa.String(length=255), nullable=True),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("reply_to", sa.String(length=255), nullable=False),
        sa.Column("num_claims", sa.BigInteger(), nullable=False),
        sa.Column("claim_id", sa.String(length=255), nullable=True),
        sa.Column("lease_expires_at", sa.Float(precision=53), nullable=True),
        sa.ForeignKeyConstraint(
            ["base_model"], ["base_models.name"], name=op.f("fk_inference_requests_base_model_base_models")
        ),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name=op.f("fk_inference_requests_project_id_projects")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_inference_requests")),
        sa.UniqueConstraint("claim_id", name=op.f("uq_inference_requests_claim_id")),
    )
    for columns in (("expires_at",), ("pack_key", "created_at"), ("project_id", "created_at")):
        op.create_index(op.f(f"ix_inference_requests_{'_'.join(columns)}"), "inference_requests", [*columns])
    for name in TOKENS:
        op.add_column("usage_days", sa.Column(name, sa.BigInteger(), server_default="0", nullable=False))


def downgrade() -> None:
    for name in TOKENS:
        op.drop_column("usage_days", name)
    op.drop_table("inference_requests")
