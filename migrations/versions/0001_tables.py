"""Initial schema: every table and index."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001_tables"
down_revision = None
branch_labels = None
depends_on = None

TABLES = (
    "organizations",
    "projects",
    "api_keys",
    "model_permissions",
    "project_usage",
    "sign_ins",
    "artifacts",
    "base_models",
    "files",
    "prepared",
    "uploads",
    "upload_parts",
    "jobs",
    "adapters",
    "idempotency_keys",
    "job_labels",
    "attempts",
    "checkpoints",
    "events",
    "tracker_runs",
    "metric_blocks",
    "job_outputs",
    "file_overlaps",
    "plans",
    "sweeps",
    "trials",
    "gang_seats",
    "gangs",
    "pulse",
    "service",
    "trainers",
    "workers",
    "tallies",
    "stored_bytes",
    "stored_days",
    "usage_days",
    "usage_months",
    "webhook_endpoints",
    "webhook_deliveries",
    "webhook_tries",
    "audit_events",
    "audit_head",
    "retired_keys",
    "batches",
    "batch_lines",
    "wanted_bases",
    "serving_endpoints",
    "deployments",
    "adapter_exports",
    "tasks",
    "task_turns",
)
"""Tables in dependency order: each table follows the tables that it references."""


def upgrade() -> None:
    _create_tenancy()
    _create_storage()
    _create_jobs()
    _create_history()
    _create_plans()
    _create_sweeps()
    _create_fleet()
    _create_usage()
    _create_webhooks()
    _create_audit()
    _create_inference()
    _create_serving()
    _create_tasks()


def downgrade() -> None:
    for name in reversed(TABLES):
        op.drop_table(name)


def _where(condition: str) -> dict[str, Any]:
    """Return the condition of a partial index as arguments for both databases."""
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def _create_tenancy() -> None:
    op.create_table(
        "organizations",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("created_by", sa.String(length=255), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_organizations")),
        sa.UniqueConstraint("name", name=op.f("uq_organizations_name")),
    )
    op.create_table(
        "projects",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("organization_id", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("created_by", sa.String(length=255), nullable=True),
        sa.Column("archived_at", sa.Float(precision=53), nullable=True),
        sa.Column("weight", sa.Float(precision=53), server_default="1", nullable=False),
        sa.Column("highest_priority", sa.Integer(), server_default="1", nullable=False),
        sa.Column("max_concurrent_jobs", sa.BigInteger(), nullable=True),
        sa.Column("max_queued_jobs", sa.BigInteger(), nullable=True),
        sa.Column("max_jobs_per_day", sa.BigInteger(), nullable=True),
        sa.Column("max_device_hours_per_month", sa.Float(precision=53), nullable=True),
        sa.Column("max_stored_bytes", sa.BigInteger(), nullable=True),
        sa.Column("max_plans_per_day", sa.BigInteger(), server_default="500", nullable=True),
        sa.Column("max_tokens_per_day", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name=op.f("fk_projects_organization_id_organizations")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_projects")),
        sa.UniqueConstraint("name", name=op.f("uq_projects_name")),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("digest", sa.String(length=255), nullable=False),
        sa.Column("is_operator", sa.Boolean(), nullable=False),
        sa.Column("scopes", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("ending", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("created_by", sa.String(length=255), nullable=True),
        sa.Column("last_used_at", sa.Float(precision=53), nullable=True),
        sa.Column("expires_at", sa.Float(precision=53), nullable=True),
        sa.Column("revoked_at", sa.Float(precision=53), nullable=True),
        sa.Column("replaced_by", sa.String(length=255), nullable=True),
        sa.Column("requests_per_minute", sa.BigInteger(), nullable=True),
        sa.Column("jobs_per_day", sa.BigInteger(), nullable=True),
        sa.Column("highest_priority", sa.Integer(), server_default="1", nullable=False),
        sa.Column("idempotency_key", sa.String(length=255), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_api_keys_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("digest", name=op.f("uq_api_keys_digest")),
    )
    op.create_index(op.f("ix_api_keys_created_by_created_at"), "api_keys", ["created_by", "created_at"])
    op.create_index(op.f("ix_api_keys_project_id_created_at_id"), "api_keys", ["project_id", "created_at", "id"])
    op.create_index("ix_api_keys_valid", "api_keys", ["project_id"], **_where("revoked_at IS NULL"))
    op.create_table(
        "model_permissions",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("model_id", sa.String(length=255), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("created_by", sa.String(length=255), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_model_permissions_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model_permissions")),
    )
    op.create_index(
        op.f("ix_model_permissions_model_id_project_id"), "model_permissions", ["model_id", "project_id"], unique=True
    )
    op.create_index(
        op.f("ix_model_permissions_project_id_created_at_model_id"),
        "model_permissions",
        ["project_id", "created_at", "model_id"],
    )
    op.create_table(
        "project_usage",
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("device_seconds", sa.Float(precision=53), nullable=False),
        sa.Column("as_of", sa.Float(precision=53), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_project_usage_project_id_projects")),
        sa.PrimaryKeyConstraint("project_id", "slot", name=op.f("pk_project_usage")),
    )
    op.create_table(
        "sign_ins",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("api_key_id", sa.String(length=255), nullable=False),
        sa.Column("link_digest", sa.String(length=255), nullable=True),
        sa.Column("browser_digest", sa.String(length=255), nullable=True),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("expires_at", sa.Float(precision=53), nullable=False),
        sa.ForeignKeyConstraint(["api_key_id"], ["api_keys.id"], name=op.f("fk_sign_ins_api_key_id_api_keys")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sign_ins")),
        sa.UniqueConstraint("browser_digest", name=op.f("uq_sign_ins_browser_digest")),
        sa.UniqueConstraint("link_digest", name=op.f("uq_sign_ins_link_digest")),
    )


def _create_storage() -> None:
    op.create_table(
        "artifacts",
        sa.Column("digest", sa.String(length=255), nullable=False),
        sa.Column("kind", sa.String(length=255), nullable=False),
        sa.Column("files", sa.JSON(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_artifacts")),
    )
    op.create_table(
        "base_models",
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("kind", sa.String(length=255), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("revision", sa.String(length=255), nullable=True),
        sa.Column("chat_template", sa.Text(), nullable=True),
        sa.Column("state", sa.String(length=255), nullable=False),
        sa.Column("digest", sa.String(length=255), nullable=True),
        sa.Column("manifest", sa.JSON(), nullable=True),
        sa.Column("description", sa.JSON(), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_base_models")),
    )
    op.create_table(
        "files",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("purpose", sa.String(length=255), nullable=False),
        sa.Column("filename", sa.String(length=255), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("num_rows", sa.BigInteger(), nullable=True),
        sa.Column("kind", sa.String(length=255), nullable=True),
        sa.Column("digest", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("expires_at", sa.Float(precision=53), nullable=True),
        sa.Column("deleted_at", sa.Float(precision=53), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_files_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_files")),
    )
    op.create_index("ix_files_deleted", "files", ["project_id", "deleted_at"], **_where("deleted_at IS NOT NULL"))
    op.create_index("ix_files_expiring", "files", ["expires_at"], **_where("expires_at IS NOT NULL"))
    op.create_index(op.f("ix_files_project_id_created_at_id"), "files", ["project_id", "created_at", "id"])
    op.create_index(op.f("ix_files_project_id_digest"), "files", ["project_id", "digest"])
    op.create_table(
        "prepared",
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("file_digest", sa.String(length=255), nullable=False),
        sa.Column("artifact", sa.String(length=255), nullable=True),
        sa.Column("num_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("evicted_at", sa.Float(precision=53), nullable=True),
        sa.Column("report", sa.JSON(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.ForeignKeyConstraint(["artifact"], ["artifacts.digest"], name=op.f("fk_prepared_artifact_artifacts")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_prepared_project_id_projects")),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_prepared")),
    )
    op.create_index(op.f("ix_prepared_artifact"), "prepared", ["artifact"])
    op.create_index(op.f("ix_prepared_file_digest"), "prepared", ["file_digest"])
    op.create_index(op.f("ix_prepared_project_id_file_digest"), "prepared", ["project_id", "file_digest"])
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("purpose", sa.String(length=255), nullable=False),
        sa.Column("filename", sa.String(length=255), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("part_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("lifetime_seconds", sa.BigInteger(), nullable=True),
        sa.Column("file_id", sa.String(length=255), nullable=True),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("expires_at", sa.Float(precision=53), nullable=False),
        sa.Column("cancelled_at", sa.Float(precision=53), nullable=True),
        sa.Column("completing_until", sa.Float(precision=53), nullable=True),
        sa.Column("num_completions", sa.BigInteger(), server_default="0", nullable=False),
        sa.ForeignKeyConstraint(["file_id"], ["files.id"], name=op.f("fk_uploads_file_id_files")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_uploads_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_uploads")),
    )
    op.create_index(
        "ix_uploads_counted",
        "uploads",
        ["project_id"],
        **_where("(part_bytes > 0 OR (file_id IS NULL AND cancelled_at IS NULL))"),
    )
    op.create_table(
        "upload_parts",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("upload_id", sa.String(length=255), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.ForeignKeyConstraint(["upload_id"], ["uploads.id"], name=op.f("fk_upload_parts_upload_id_uploads")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_upload_parts")),
    )
    op.create_index(op.f("ix_upload_parts_upload_id_digest"), "upload_parts", ["upload_id", "digest"], unique=True)


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("created_by", sa.String(length=255), nullable=False),
        sa.Column("state", sa.String(length=255), nullable=False),
        sa.Column("reason", sa.String(length=255), nullable=True),
        sa.Column("base_model", sa.String(length=255), nullable=False),
        sa.Column("base_digest", sa.String(length=255), nullable=False),
        sa.Column("pack_key", sa.String(length=255), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("requested", sa.JSON(), nullable=False),
        sa.Column("body_digest", sa.String(length=255), nullable=True),
        sa.Column("trace", sa.String(length=64), nullable=True),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("parent_adapter", sa.String(length=255), nullable=True),
        sa.Column("adapter_parameters", sa.BigInteger(), nullable=False),
        sa.Column("sweep_id", sa.String(length=255), nullable=True),
        sa.Column("suffix", sa.String(length=255), nullable=True),
        sa.Column("labels", sa.JSON(), nullable=True),
        sa.Column("tags", sa.JSON(), nullable=True),
        sa.Column("training_file", sa.String(length=255), nullable=False),
        sa.Column("validation_file", sa.String(length=255), nullable=True),
        sa.Column("train_prepared", sa.String(length=255), nullable=False),
        sa.Column("valid_prepared", sa.String(length=255), nullable=True),
        sa.Column("num_steps", sa.BigInteger(), nullable=True),
        sa.Column("longest_example", sa.BigInteger(), nullable=True),
        sa.Column("own_bytes", sa.BigInteger(), nullable=True),
        sa.Column("saved_bytes", sa.BigInteger(), nullable=True),
        sa.Column("trainer_bytes", sa.BigInteger(), nullable=True),
        sa.Column("slice_bytes", sa.BigInteger(), nullable=True),
        sa.Column("shardable_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("gathered_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("least_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("least_divided_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("queued_at", sa.Float(precision=53), nullable=True),
        sa.Column("place", sa.Float(precision=53), server_default="0", nullable=False),
        sa.Column("is_held", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("deadline", sa.Float(precision=53), nullable=True),
        sa.Column("needed_start", sa.Float(precision=53), nullable=True),
        sa.Column("is_late_announced", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("claimed_at", sa.Float(precision=53), nullable=True),
        sa.Column("charged_at", sa.Float(precision=53), nullable=True),
        sa.Column("device_seconds", sa.Float(precision=53), server_default="0", nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("counted_attempts", sa.BigInteger(), nullable=False),
        sa.Column("lost_attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("resumed_at", sa.Float(precision=53), nullable=True),
        sa.Column("claim_id", sa.String(length=255), nullable=True),
        sa.Column("worker_id", sa.String(length=255), nullable=True),
        sa.Column("trainer_id", sa.String(length=255), nullable=True),
        sa.Column("lease_expires_at", sa.Float(precision=53), nullable=True),
        sa.Column("lease_extended", sa.Boolean(), nullable=False),
        sa.Column("run_after", sa.Float(precision=53), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("pause_requested", sa.Boolean(), nullable=False),
        sa.Column("preempted_for", sa.String(length=255), nullable=True),
        sa.Column("num_preemptions", sa.Integer(), server_default="0", nullable=False),
        sa.Column("preemption_requested_at", sa.Float(precision=53), nullable=True),
        sa.Column("started_at", sa.Float(precision=53), nullable=True),
        sa.Column("finished_at", sa.Float(precision=53), nullable=True),
        sa.Column("trained_tokens", sa.BigInteger(), nullable=True),
        sa.Column("progress", sa.JSON(), nullable=True),
        sa.Column("adapter_name", sa.String(length=255), nullable=True),
        sa.Column("result_file", sa.String(length=255), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("reproduces", sa.JSON(), nullable=True),
        sa.Column("reproduction", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(["base_model"], ["base_models.name"], name=op.f("fk_jobs_base_model_base_models")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_jobs_project_id_projects")),
        sa.ForeignKeyConstraint(["training_file"], ["files.id"], name=op.f("fk_jobs_training_file_files")),
        sa.ForeignKeyConstraint(["validation_file"], ["files.id"], name=op.f("fk_jobs_validation_file_files")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        sa.UniqueConstraint("claim_id", name=op.f("uq_jobs_claim_id")),
    )
    op.create_index(
        "ix_jobs_alike",
        "jobs",
        ["pack_key", "project_id", "priority", "place", "id"],
        **_where("queued_at IS NOT NULL"),
    )
    op.create_index(op.f("ix_jobs_created_by_created_at"), "jobs", ["created_by", "created_at"])
    op.create_index("ix_jobs_deadlines", "jobs", ["deadline"], **_where("deadline IS NOT NULL AND finished_at IS NULL"))
    op.create_index("ix_jobs_heads", "jobs", ["state", "project_id", "priority", "is_held", "place", "id"])
    op.create_index(op.f("ix_jobs_parent_adapter"), "jobs", ["parent_adapter"])
    op.create_index(op.f("ix_jobs_project_id_created_at_id"), "jobs", ["project_id", "created_at", "id"])
    op.create_index(
        "ix_jobs_smallest", "jobs", ["project_id", "priority", "least_bytes", "id"], **_where("queued_at IS NOT NULL")
    )
    op.create_index(
        "ix_jobs_smallest_alike",
        "jobs",
        ["pack_key", "project_id", "priority", "least_bytes", "id"],
        **_where("queued_at IS NOT NULL"),
    )
    op.create_index(
        "ix_jobs_smallest_divided",
        "jobs",
        ["project_id", "priority", "least_divided_bytes", "id"],
        **_where("queued_at IS NOT NULL"),
    )
    op.create_index(
        "ix_jobs_smallest_divided_alike",
        "jobs",
        ["pack_key", "project_id", "priority", "least_divided_bytes", "id"],
        **_where("queued_at IS NOT NULL"),
    )
    op.create_index(op.f("ix_jobs_state_lease_expires_at"), "jobs", ["state", "lease_expires_at"])
    op.create_index(op.f("ix_jobs_sweep_id_state"), "jobs", ["sweep_id", "state"])
    op.create_index(op.f("ix_jobs_training_file"), "jobs", ["training_file"])
    op.create_index(op.f("ix_jobs_validation_file"), "jobs", ["validation_file"])
    op.create_index("ix_jobs_waiting", "jobs", ["priority", "queued_at"], **_where("queued_at IS NOT NULL"))
    op.create_index(
        "ix_jobs_without_metadata",
        "jobs",
        ["project_id", "created_at", "id"],
        **_where("CAST(labels AS TEXT) IN ('null', '{}')"),
    )
    op.create_table(
        "adapters",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("job_id", sa.String(length=255), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("base_model", sa.String(length=255), nullable=False),
        sa.Column("base_digest", sa.String(length=255), nullable=False),
        sa.Column("artifact", sa.String(length=255), nullable=False),
        sa.Column("num_parameters", sa.BigInteger(), nullable=False),
        sa.Column("verification", sa.JSON(), nullable=False),
        sa.Column("evaluation", sa.JSON(), nullable=True),
        sa.Column("lineage", sa.JSON(), nullable=False),
        sa.Column("lineage_id", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("deleted_at", sa.Float(precision=53), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_adapters_job_id_jobs")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_adapters_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_adapters")),
        sa.UniqueConstraint("job_id", name=op.f("uq_adapters_job_id")),
        sa.UniqueConstraint("name", name=op.f("uq_adapters_name")),
    )
    op.create_index(op.f("ix_adapters_artifact"), "adapters", ["artifact"])
    op.create_index(op.f("ix_adapters_project_id_created_at_id"), "adapters", ["project_id", "created_at", "id"])
    op.create_table(
        "idempotency_keys",
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("body_digest", sa.String(length=255), nullable=False),
        sa.Column("job_id", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_idempotency_keys_job_id_jobs")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_idempotency_keys_project_id_projects")),
        sa.PrimaryKeyConstraint("project_id", "key", name=op.f("pk_idempotency_keys")),
    )
    op.create_table(
        "job_labels",
        sa.Column("job_id", sa.String(length=255), nullable=False),
        sa.Column("label", sa.String(length=64), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_labels_job_id_jobs")),
        sa.PrimaryKeyConstraint("job_id", "label", name=op.f("pk_job_labels")),
    )
    op.create_index(
        op.f("ix_job_labels_project_id_label_created_at_job_id"),
        "job_labels",
        ["project_id", "label", "created_at", "job_id"],
    )


def _create_history() -> None:
    op.create_table(
        "attempts",
        sa.Column("claim_id", sa.String(length=255), nullable=False),
        sa.Column("job_id", sa.String(length=255), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("worker_id", sa.String(length=255), nullable=False),
        sa.Column("trainer_id", sa.String(length=255), nullable=False),
        sa.Column("started_at", sa.Float(precision=53), nullable=False),
        sa.Column("ended_at", sa.Float(precision=53), nullable=True),
        sa.Column("reason", sa.String(length=255), nullable=True),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.Column("blamed_worker_id", sa.String(length=255), nullable=True),
        sa.Column("resumed_from_step", sa.BigInteger(), nullable=True),
        sa.Column("why", sa.JSON(), nullable=False),
        sa.Column("preemption", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_attempts_job_id_jobs")),
        sa.PrimaryKeyConstraint("claim_id", name=op.f("pk_attempts")),
    )
    op.create_index(
        "ix_attempts_blamed", "attempts", ["blamed_worker_id", "ended_at"], **_where("blamed_worker_id IS NOT NULL")
    )
    op.create_index("ix_attempts_ended", "attempts", ["worker_id", "ended_at"], **_where("ended_at IS NOT NULL"))
    op.create_index(op.f("ix_attempts_job_id"), "attempts", ["job_id"])
    op.create_index("ix_attempts_live", "attempts", ["worker_id"], **_where("ended_at IS NULL"))
    op.create_index(op.f("ix_attempts_trainer_id_ended_at"), "attempts", ["trainer_id", "ended_at"])
    op.create_table(
        "checkpoints",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("job_id", sa.String(length=255), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("artifact", sa.String(length=255), nullable=True),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("adapter", sa.String(length=255), nullable=True),
        sa.Column("lineage", sa.JSON(), nullable=True),
        sa.Column("lineage_id", sa.String(length=255), nullable=True),
        sa.ForeignKeyConstraint(["artifact"], ["artifacts.digest"], name=op.f("fk_checkpoints_artifact_artifacts")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_checkpoints_job_id_jobs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoints")),
    )
    op.create_index(op.f("ix_checkpoints_adapter"), "checkpoints", ["adapter"])
    op.create_index(op.f("ix_checkpoints_artifact"), "checkpoints", ["artifact"])
    op.create_index(op.f("ix_checkpoints_job_id_step"), "checkpoints", ["job_id", "step"], unique=True)
    op.create_index(op.f("ix_checkpoints_name"), "checkpoints", ["name"])
    op.create_table(
        "events",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("job_id", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("level", sa.String(length=255), nullable=False),
        sa.Column("type", sa.String(length=255), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("data", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_events_job_id_jobs")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_events")),
    )
    op.create_index(op.f("ix_events_job_id_seq"), "events", ["job_id", "seq"])
    op.create_index("ix_events_messages", "events", ["job_id", "seq"], **_where("type <> 'metrics'"))
    op.create_table(
        "tracker_runs",
        sa.Column("job_id", sa.String(length=255), nullable=False),
        sa.Column("type", sa.String(length=32), nullable=False),
        sa.Column("run_id", sa.String(length=255), nullable=True),
        sa.Column("train_step", sa.BigInteger(), nullable=False),
        sa.Column("valid_step", sa.BigInteger(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("finished_at", sa.Float(precision=53), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_tracker_runs_job_id_jobs")),
        sa.PrimaryKeyConstraint("job_id", "type", name=op.f("pk_tracker_runs")),
    )
    op.create_table(
        "metric_blocks",
        sa.Column("job_id", sa.String(length=255), nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("first_step", sa.BigInteger(), nullable=False),
        sa.Column("last_step", sa.BigInteger(), nullable=False),
        sa.Column("num_points", sa.Integer(), nullable=False),
        sa.Column("last_seq", sa.BigInteger(), nullable=False),
        sa.Column("least_loss", sa.Float(precision=53), nullable=False),
        sa.Column("sketch", sa.LargeBinary(), nullable=True),
        sa.Column("outline", sa.LargeBinary(), nullable=True),
        sa.Column("points", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_metric_blocks_job_id_jobs")),
        sa.PrimaryKeyConstraint("job_id", "kind", "first_step", name=op.f("pk_metric_blocks")),
    )
    op.create_index(op.f("ix_metric_blocks_job_id_last_seq"), "metric_blocks", ["job_id", "last_seq"])
    op.create_table(
        "job_outputs",
        sa.Column("claim_id", sa.String(length=255), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.String(length=255), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(length=255), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("written_at", sa.Float(precision=53), nullable=False),
        sa.ForeignKeyConstraint(["claim_id"], ["attempts.claim_id"], name=op.f("fk_job_outputs_claim_id_attempts")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_outputs_job_id_jobs")),
        sa.PrimaryKeyConstraint("claim_id", "rank", name=op.f("pk_job_outputs")),
    )
    op.create_index(op.f("ix_job_outputs_job_id"), "job_outputs", ["job_id"])


def _create_plans() -> None:
    op.create_table(
        "file_overlaps",
        sa.Column("train_key", sa.String(length=255), nullable=False),
        sa.Column("valid_key", sa.String(length=255), nullable=False),
        sa.Column("num_rows", sa.BigInteger(), nullable=False),
        sa.Column("of_rows", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("train_key", "valid_key", name=op.f("pk_file_overlaps")),
    )
    op.create_table(
        "plans",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("created_by", sa.String(length=255), nullable=False),
        sa.Column("expires_at", sa.Float(precision=53), nullable=False),
        sa.Column("state", sa.String(length=255), nullable=False),
        sa.Column("base_model", sa.String(length=255), nullable=False),
        sa.Column("base_digest", sa.String(length=255), nullable=False),
        sa.Column("requested", sa.JSON(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("training_file", sa.String(length=255), nullable=False),
        sa.Column("validation_file", sa.String(length=255), nullable=True),
        sa.Column("train_prepared", sa.String(length=255), nullable=False),
        sa.Column("valid_prepared", sa.String(length=255), nullable=True),
        sa.Column("found", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("error", sa.JSON(none_as_null=True), nullable=True),
        sa.ForeignKeyConstraint(["base_model"], ["base_models.name"], name=op.f("fk_plans_base_model_base_models")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_plans_project_id_projects")),
        sa.ForeignKeyConstraint(["training_file"], ["files.id"], name=op.f("fk_plans_training_file_files")),
        sa.ForeignKeyConstraint(["validation_file"], ["files.id"], name=op.f("fk_plans_validation_file_files")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_plans")),
    )
    op.create_index(op.f("ix_plans_expires_at"), "plans", ["expires_at"])
    op.create_index(op.f("ix_plans_project_id_created_at_id"), "plans", ["project_id", "created_at", "id"])
    op.create_index(op.f("ix_plans_state_created_at"), "plans", ["state", "created_at"])


def _create_sweeps() -> None:
    op.create_table(
        "sweeps",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("created_by", sa.String(length=255), nullable=False),
        sa.Column("idempotency_key", sa.String(length=255), nullable=True),
        sa.Column("body_digest", sa.String(length=255), nullable=False),
        sa.Column("requested", sa.JSON(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("num_trials", sa.BigInteger(), nullable=False),
        sa.Column("max_concurrent", sa.BigInteger(), nullable=True),
        sa.Column("rungs", sa.JSON(), nullable=True),
        sa.Column("training_file", sa.String(length=255), nullable=False),
        sa.Column("validation_file", sa.String(length=255), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("num_created", sa.BigInteger(), nullable=False),
        sa.Column("is_closed", sa.Boolean(), nullable=False),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("due_at", sa.Float(precision=53), nullable=True),
        sa.Column("finished_at", sa.Float(precision=53), nullable=True),
        sa.Column("best_job", sa.String(length=255), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_sweeps_project_id_projects")),
        sa.ForeignKeyConstraint(["training_file"], ["files.id"], name=op.f("fk_sweeps_training_file_files")),
        sa.ForeignKeyConstraint(["validation_file"], ["files.id"], name=op.f("fk_sweeps_validation_file_files")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sweeps")),
    )
    op.create_index(op.f("ix_sweeps_created_by_created_at"), "sweeps", ["created_by", "created_at"])
    op.create_index("ix_sweeps_due", "sweeps", ["due_at"], **_where("due_at IS NOT NULL"))
    op.create_index(op.f("ix_sweeps_finished_at"), "sweeps", ["finished_at"])
    op.create_index(op.f("ix_sweeps_project_id_created_at_id"), "sweeps", ["project_id", "created_at", "id"])
    op.create_index(
        op.f("ix_sweeps_project_id_idempotency_key"), "sweeps", ["project_id", "idempotency_key"], unique=True
    )
    op.create_table(
        "trials",
        sa.Column("job_id", sa.String(length=255), nullable=False),
        sa.Column("sweep_id", sa.String(length=255), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("parameters", sa.JSON(), nullable=False),
        sa.Column("score", sa.Float(precision=53), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=True),
        sa.Column("recent", sa.JSON(), nullable=True),
        sa.Column("reached_step", sa.BigInteger(), nullable=True),
        sa.Column("reached_score", sa.Float(precision=53), nullable=True),
        sa.Column("pruner_state", sa.JSON(), nullable=True),
        sa.Column("stopped", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_trials_job_id_jobs")),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweeps.id"], name=op.f("fk_trials_sweep_id_sweeps")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_trials")),
    )
    op.create_index(op.f("ix_trials_sweep_id_number"), "trials", ["sweep_id", "number"], unique=True)
    op.create_index(op.f("ix_trials_sweep_id_score_number"), "trials", ["sweep_id", "score", "number"])


def _create_fleet() -> None:
    op.create_table(
        "gang_seats",
        sa.Column("worker_id", sa.String(length=255), nullable=False),
        sa.Column("gang", sa.String(length=255), nullable=False),
        sa.Column("kind", sa.String(length=255), nullable=False),
        sa.Column("num_processes", sa.Integer(), nullable=False),
        sa.Column("versions", sa.String(length=255), nullable=False),
        sa.Column("free_bytes", sa.BigInteger(), nullable=False),
        sa.Column("round_id", sa.String(length=255), nullable=True),
        sa.Column("first_rank", sa.Integer(), nullable=True),
        sa.Column("joined_at", sa.Float(precision=53), nullable=True),
        sa.Column("is_leaving", sa.Boolean(), nullable=False),
        sa.Column("num_missed", sa.Integer(), nullable=False),
        sa.Column("num_failed", sa.Integer(), server_default="0", nullable=False),
        sa.Column("ended", sa.JSON(none_as_null=True), nullable=True),
        sa.PrimaryKeyConstraint("worker_id", name=op.f("pk_gang_seats")),
    )
    op.create_index(op.f("ix_gang_seats_gang"), "gang_seats", ["gang"])
    op.create_table(
        "gangs",
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("leader_id", sa.String(length=255), nullable=True),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("min_size", sa.Integer(), nullable=False),
        sa.Column("round_id", sa.String(length=255), nullable=True),
        sa.Column("task", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("expires_at", sa.Float(precision=53), nullable=True),
        sa.Column("port", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_gangs")),
    )
    op.create_table(
        "pulse",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("seen_at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pulse")),
    )
    op.create_table(
        "service",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("oldest_protocol", sa.Integer(), nullable=False),
        sa.Column("newest_protocol", sa.Integer(), nullable=False),
        sa.Column("version", sa.String(length=255), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_service")),
    )
    op.create_table(
        "trainers",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("worker_id", sa.String(length=255), nullable=False),
        sa.Column("base_digest", sa.String(length=255), nullable=False),
        sa.Column("pack_key", sa.String(length=255), nullable=False),
        sa.Column("started_at", sa.Float(precision=53), nullable=False),
        sa.Column("ended_at", sa.Float(precision=53), nullable=True),
        sa.Column("address", sa.String(length=255), nullable=True),
        sa.Column("secret", sa.String(length=255), nullable=True),
        sa.Column("report", sa.JSON(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_trainers")),
    )
    op.create_index(op.f("ix_trainers_pack_key_started_at"), "trainers", ["pack_key", "started_at"])
    op.create_index(op.f("ix_trainers_worker_id"), "trainers", ["worker_id"])
    op.create_table(
        "workers",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("host", sa.String(length=255), nullable=False),
        sa.Column("pid", sa.BigInteger(), nullable=False),
        sa.Column("devices", sa.JSON(), nullable=False),
        sa.Column("integrations", sa.JSON(), nullable=False),
        sa.Column("version", sa.String(length=255), nullable=False),
        sa.Column("protocol", sa.Integer(), nullable=False),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=False),
        sa.Column("started_at", sa.Float(precision=53), nullable=False),
        sa.Column("heartbeat_at", sa.Float(precision=53), nullable=False),
        sa.Column("ended_at", sa.Float(precision=53), nullable=True),
        sa.Column("drain_requested", sa.Boolean(), nullable=False),
        sa.Column("cordon", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("uncordoned_at", sa.Float(precision=53), nullable=True),
        sa.Column("resident_base", sa.String(length=255), nullable=True),
        sa.Column("trainer_id", sa.String(length=255), nullable=True),
        sa.Column("report", sa.JSON(), nullable=True),
        sa.Column("served_at", sa.JSON(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
    )


def _create_usage() -> None:
    op.create_table(
        "tallies",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("label", sa.String(length=64), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", "label", "slot", name=op.f("pk_tallies")),
    )
    op.create_table(
        "stored_bytes",
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_stored_bytes_project_id_projects")),
        sa.PrimaryKeyConstraint("project_id", name=op.f("pk_stored_bytes")),
    )
    op.create_table(
        "stored_days",
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("day", sa.Integer(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_stored_days_project_id_projects")),
        sa.PrimaryKeyConstraint("project_id", "day", name=op.f("pk_stored_days")),
    )
    op.create_table(
        "usage_days",
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("day", sa.Integer(), nullable=False),
        sa.Column("base_model", sa.String(length=255), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("device_seconds", sa.Float(precision=53), nullable=False),
        sa.Column("trained_tokens", sa.BigInteger(), nullable=False),
        sa.Column("num_created", sa.BigInteger(), nullable=False),
        sa.Column("num_succeeded", sa.BigInteger(), nullable=False),
        sa.Column("num_failed", sa.BigInteger(), nullable=False),
        sa.Column("num_cancelled", sa.BigInteger(), nullable=False),
        sa.Column("num_plans", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("num_completions", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_usage_days_project_id_projects")),
        sa.PrimaryKeyConstraint("project_id", "day", "base_model", "slot", name=op.f("pk_usage_days")),
    )
    op.create_index(op.f("ix_usage_days_day"), "usage_days", ["day"])
    op.create_table(
        "usage_months",
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("month", sa.Integer(), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("device_seconds", sa.Float(precision=53), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_usage_months_project_id_projects")),
        sa.PrimaryKeyConstraint("project_id", "month", "slot", name=op.f("pk_usage_months")),
    )


def _create_webhooks() -> None:
    op.create_table(
        "webhook_endpoints",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("sealed_url", sa.Text(), nullable=False),
        sa.Column("event_types", sa.JSON(), nullable=False),
        sa.Column("salt", sa.String(length=255), nullable=False),
        sa.Column("ending", sa.String(length=255), nullable=False),
        sa.Column("secret_made_at", sa.Float(precision=53), nullable=False),
        sa.Column("previous_salt", sa.String(length=255), nullable=True),
        sa.Column("previous_ending", sa.String(length=255), nullable=True),
        sa.Column("previous_until", sa.Float(precision=53), nullable=True),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("updated_at", sa.Float(precision=53), nullable=False),
        sa.Column("failing_since", sa.Float(precision=53), nullable=True),
        sa.Column("disabled_at", sa.Float(precision=53), nullable=True),
        sa.Column("disabled_reason", sa.String(length=255), nullable=True),
        sa.Column("deleted_at", sa.Float(precision=53), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_webhook_endpoints_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_endpoints")),
    )
    op.create_index(
        op.f("ix_webhook_endpoints_project_id_created_at_id"), "webhook_endpoints", ["project_id", "created_at", "id"]
    )
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("endpoint_id", sa.String(length=255), nullable=False),
        sa.Column("event_id", sa.String(length=255), nullable=False),
        sa.Column("event_type", sa.String(length=255), nullable=False),
        sa.Column("event_at", sa.Float(precision=53), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("status", sa.String(length=255), nullable=False),
        sa.Column("is_test", sa.Boolean(), nullable=False),
        sa.Column("num_tries", sa.Integer(), nullable=False),
        sa.Column("num_tries_before", sa.Integer(), nullable=False),
        sa.Column("next_try_at", sa.Float(precision=53), nullable=True),
        sa.Column("ended_at", sa.Float(precision=53), nullable=True),
        sa.ForeignKeyConstraint(
            ["endpoint_id"], ["webhook_endpoints.id"], name=op.f("fk_webhook_deliveries_endpoint_id_webhook_endpoints")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_deliveries")),
    )
    op.create_index(
        "ix_webhook_deliveries_due", "webhook_deliveries", ["next_try_at"], **_where("next_try_at IS NOT NULL")
    )
    op.create_index(
        op.f("ix_webhook_deliveries_endpoint_id_created_at_id"),
        "webhook_deliveries",
        ["endpoint_id", "created_at", "id"],
    )
    op.create_index(
        "ix_webhook_deliveries_turn",
        "webhook_deliveries",
        ["endpoint_id", "next_try_at"],
        **_where("next_try_at IS NOT NULL"),
    )
    op.create_table(
        "webhook_tries",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("delivery_id", sa.String(length=255), nullable=False),
        sa.Column("started_at", sa.Float(precision=53), nullable=False),
        sa.Column("seconds", sa.Float(precision=53), nullable=False),
        sa.Column("status_code", sa.Integer(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("reply", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["delivery_id"], ["webhook_deliveries.id"], name=op.f("fk_webhook_tries_delivery_id_webhook_deliveries")
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_webhook_tries")),
    )
    op.create_index(op.f("ix_webhook_tries_delivery_id"), "webhook_tries", ["delivery_id"])


def _create_audit() -> None:
    op.create_table(
        "audit_events",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("type", sa.String(length=255), nullable=False),
        sa.Column("effective_at", sa.Float(precision=53), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=True),
        sa.Column("object_id", sa.String(length=255), nullable=True),
        sa.Column("actor_type", sa.String(length=255), nullable=False),
        sa.Column("actor_id", sa.String(length=255), nullable=True),
        sa.Column("actor_name", sa.String(length=255), nullable=True),
        sa.Column("request_id", sa.String(length=255), nullable=True),
        sa.Column("address", sa.String(length=255), nullable=True),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.Column("link", sa.BigInteger(), nullable=True),
        sa.Column("previous", sa.String(length=255), nullable=True),
        sa.Column("digest", sa.String(length=255), nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_audit_events")),
        sa.UniqueConstraint("id", name=op.f("uq_audit_events_id")),
        sa.UniqueConstraint("link", name=op.f("uq_audit_events_link")),
    )
    op.create_index(
        op.f("ix_audit_events_actor_id_effective_at_id"), "audit_events", ["actor_id", "effective_at", "id"]
    )
    op.create_index(op.f("ix_audit_events_effective_at_id"), "audit_events", ["effective_at", "id"])
    op.create_index(
        op.f("ix_audit_events_project_id_effective_at_id"), "audit_events", ["project_id", "effective_at", "id"]
    )
    op.create_index(op.f("ix_audit_events_type_effective_at_id"), "audit_events", ["type", "effective_at", "id"])
    op.create_index("ix_audit_events_unsealed", "audit_events", ["seq"], **_where("link IS NULL"))
    op.create_table(
        "audit_head",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("link", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(length=255), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_head")),
    )
    op.create_table(
        "retired_keys",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("sealed", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_retired_keys")),
    )


def _create_inference() -> None:
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
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_batches_project_id_projects")),
        sa.ForeignKeyConstraint(["input_file"], ["files.id"], name=op.f("fk_batches_input_file_files")),
        sa.ForeignKeyConstraint(["output_file"], ["files.id"], name=op.f("fk_batches_output_file_files")),
        sa.ForeignKeyConstraint(["error_file"], ["files.id"], name=op.f("fk_batches_error_file_files")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batches")),
    )
    op.create_index(op.f("ix_batches_project_id_created_at_id"), "batches", ["project_id", "created_at", "id"])
    op.create_table(
        "batch_lines",
        sa.Column("batch_id", sa.String(length=255), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("is_failed", sa.Boolean(), nullable=False),
        sa.Column("result", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name=op.f("fk_batch_lines_batch_id_batches")),
        sa.PrimaryKeyConstraint("batch_id", "number", name=op.f("pk_batch_lines")),
    )
    op.create_table(
        "wanted_bases",
        sa.Column("pack_key", sa.String(length=255), nullable=False),
        sa.Column("base_model", sa.String(length=255), nullable=False),
        sa.Column("base_digest", sa.String(length=255), nullable=False),
        sa.Column("wanted_since", sa.Float(precision=53), nullable=False),
        sa.Column("wanted_until", sa.Float(precision=53), nullable=False),
        sa.Column("clients_until", sa.Float(precision=53), nullable=False),
        sa.Column("error", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("failed_at", sa.Float(precision=53), nullable=True),
        sa.ForeignKeyConstraint(
            ["base_model"], ["base_models.name"], name=op.f("fk_wanted_bases_base_model_base_models")
        ),
        sa.PrimaryKeyConstraint("pack_key", name=op.f("pk_wanted_bases")),
    )


def _create_serving() -> None:
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
        sa.ForeignKeyConstraint(
            ["base_model"], ["base_models.name"], name=op.f("fk_serving_endpoints_base_model_base_models")
        ),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_serving_endpoints_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_serving_endpoints")),
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
        sa.Column("operator_error", sa.Text(), nullable=True),
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
        sa.Column("started_at", sa.Float(precision=53), nullable=True),
        sa.Column("finished_at", sa.Float(precision=53), nullable=True),
        sa.Column("error", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("artifact", sa.String(length=255), nullable=True),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("expected_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("refused_since", sa.Float(precision=53), nullable=True),
        sa.Column("verification", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("cost", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("hub_url", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["artifact"], ["artifacts.digest"], name=op.f("fk_adapter_exports_artifact_artifacts")),
        sa.ForeignKeyConstraint(
            ["base_model"], ["base_models.name"], name=op.f("fk_adapter_exports_base_model_base_models")
        ),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_adapter_exports_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_adapter_exports")),
    )
    for columns in (
        ("adapter_artifact",),
        ("adapter_id",),
        ("artifact",),
        ("project_id", "adapter_id", "created_at"),
        ("status", "created_at"),
    ):
        op.create_index(op.f(f"ix_adapter_exports_{'_'.join(columns)}"), "adapter_exports", [*columns])


def _create_tasks() -> None:
    op.create_table(
        "tasks",
        sa.Column("kind", sa.String(length=255), nullable=False),
        sa.Column("subject", sa.String(length=255), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=True),
        sa.Column("run_after", sa.Float(precision=53), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("num_attempts", sa.BigInteger(), nullable=False),
        sa.Column("claim_id", sa.String(length=255), nullable=True),
        sa.Column("lease_expires_at", sa.Float(precision=53), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_tasks_project_id_projects")),
        sa.PrimaryKeyConstraint("kind", "subject", name=op.f("pk_tasks")),
        sa.UniqueConstraint("claim_id", name=op.f("uq_tasks_claim_id")),
    )
    op.create_index(op.f("ix_tasks_kind_run_after"), "tasks", ["kind", "run_after"])
    op.create_table(
        "task_turns",
        sa.Column("kind", sa.String(length=255), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("claimed_at", sa.Float(precision=53), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_task_turns_project_id_projects")),
        sa.PrimaryKeyConstraint("kind", "project_id", name=op.f("pk_task_turns")),
    )
