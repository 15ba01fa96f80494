"""Batches of inference requests, and the quota of tokens.

Revision ID: 0003_batches
Revises: 0002_inference
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003_batches"
down_revision = "0002_inference"


def upgrade() -> None:
    op.create_table(
        "batches",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("created_by", sa.String(length=255), nullable=False),
        sa.Column("endpoint", sa.String(length=255), nullable=False),
        sa.Column("input_file", sa.String(length=255), nullable=False),
        sa.Column("labels", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("lifetime_seconds", sa.BigInteger(), nullable=True),
        sa.Column("status", sa.String(length=255), nullable=False),
        sa.Column("expires_at", sa.Float(precision=53), nullable=False),
        sa.Column("turn_at", sa.Float(precision=53), nullable=False),
        sa.Column("errors", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("num_lines", sa.BigInteger(), nullable=False),
        sa.Column("num_completed", sa.BigInteger(), nullable=False),
        sa.Column("num_failed", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("output_file", sa.String(length=255), nullable=True),
        sa.Column("error_file", sa.String(length=255), nullable=True),
        sa.Column("in_progress_at", sa.Float(precision=53), nullable=True),
        sa.Column("finalizing_at", sa.Float(precision=53), nullable=True),
        sa.Column("cancelling_at", sa.Float(precision=53), nullable=True),
        sa.Column("finished_at", sa.Float(precision=53), nullable=True),
        sa.Column("claim_id", sa.String(length=255), nullable=True),
        sa.Column("lease_expires_at", sa.Float(precision=53), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_batches_project_id_projects")),
        sa.ForeignKeyConstraint(["input_file"], ["files.id"], name=op.f("fk_batches_input_file_files")),
        sa.ForeignKeyConstraint(["output_file"], ["files.id"], name=op.f("fk_batches_output_file_files")),
        sa.ForeignKeyConstraint(["error_file"], ["files.id"], name=op.f("fk_batches_error_file_files")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batches")),
        sa.UniqueConstraint("claim_id", name=op.f("uq_batches_claim_id")),
    )
    op.create_index(op.f("ix_batches_project_id_created_at_id"), "batches", ["project_id", "created_at", "id"])
    is_unfinished = sa.text("finished_at IS NULL")
    op.create_index(
        "ix_batches_unfinished", "batches", ["turn_at"], sqlite_where=is_unfinished, postgresql_where=is_unfinished
    )
    op.create_table(
        "batch_lines",
        sa.Column("batch_id", sa.String(length=255), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("is_failed", sa.Boolean(), nullable=False),
        sa.Column("result", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name=op.f("fk_batch_lines_batch_id_batches")),
        sa.PrimaryKeyConstraint("batch_id", "number", name=op.f("pk_batch_lines")),
    )
    batch = sa.ForeignKey("batches.id", name=op.f("fk_inference_requests_batch_id_batches"))
    column = sa.Column("batch_id", sa.String(length=255), batch, nullable=True)
    is_sqlite = op.get_context().dialect.name == "sqlite"  # it can't add a constraint to a table
    op.add_column("inference_requests", column, inline_references=is_sqlite)
    op.create_index(op.f("ix_inference_requests_batch_id"), "inference_requests", ["batch_id"])
    op.add_column("projects", sa.Column("max_tokens_per_day", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    op.drop_column("projects", "max_tokens_per_day")
    op.drop_index(op.f("ix_inference_requests_batch_id"), "inference_requests")
    op.drop_column("inference_requests", "batch_id")
    op.drop_table("batch_lines")
    op.drop_table("batches")
