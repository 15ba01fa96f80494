"""Sweeps: several jobs asked for as one, their trials, and what these had at the rungs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

TEXT, NUMBER = sa.String(255), sa.BigInteger()
IS_DUE = sa.text("due_at IS NOT NULL")


def upgrade() -> None:
    _create_sweeps()
    _create_trials()
    op.add_column("jobs", sa.Column("sweep_id", TEXT, nullable=True))
    op.create_index("ix_jobs_sweep_id_state", "jobs", ["sweep_id", "state"])


def _create_sweeps() -> None:
    op.create_table(
        "sweeps",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("project_id", TEXT, nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("created_by", TEXT, nullable=False),
        sa.Column("idempotency_key", TEXT, nullable=True),
        sa.Column("body_digest", TEXT, nullable=False),
        sa.Column("requested", sa.JSON(), nullable=False),
        sa.Column("seed", NUMBER, nullable=False),
        sa.Column("num_trials", NUMBER, nullable=False),
        sa.Column("rungs", sa.JSON(), nullable=True),
        sa.Column("training_file", TEXT, nullable=False),
        sa.Column("validation_file", TEXT, nullable=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("num_created", NUMBER, nullable=False),
        sa.Column("is_closed", sa.Boolean(), nullable=False),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("due_at", sa.Float(53), nullable=True),
        sa.Column("finished_at", sa.Float(53), nullable=True),
        sa.Column("best_job", TEXT, nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_sweeps_project_id_projects")),
        sa.ForeignKeyConstraint(["training_file"], ["files.id"], name=op.f("fk_sweeps_training_file_files")),
        sa.ForeignKeyConstraint(["validation_file"], ["files.id"], name=op.f("fk_sweeps_validation_file_files")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sweeps")),
    )
    for columns in (["project_id", "created_at", "id"], ["created_by", "created_at"], ["finished_at"]):
        op.create_index(f"ix_sweeps_{'_'.join(columns)}", "sweeps", columns)
    keys = ["project_id", "idempotency_key"]
    op.create_index("ix_sweeps_project_id_idempotency_key", "sweeps", keys, unique=True)
    op.create_index("ix_sweeps_due", "sweeps", ["due_at"], sqlite_where=IS_DUE, postgresql_where=IS_DUE)


def _create_trials() -> None:
    """With what each had at the rungs."""
    op.create_table(
        "trials",
        sa.Column("job_id", TEXT, nullable=False),
        sa.Column("sweep_id", TEXT, nullable=False),
        sa.Column("number", NUMBER, nullable=False),
        sa.Column("parameters", sa.JSON(), nullable=False),
        sa.Column("score", sa.Float(53), nullable=False),
        sa.Column("step", NUMBER, nullable=True),
        sa.Column("recent", sa.JSON(), nullable=True),
        sa.Column("rung", NUMBER, nullable=True),
        sa.Column("stopped", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_trials_job_id_jobs")),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweeps.id"], name=op.f("fk_trials_sweep_id_sweeps")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_trials")),
    )
    op.create_index("ix_trials_sweep_id_number", "trials", ["sweep_id", "number"], unique=True)
    op.create_index("ix_trials_sweep_id_score_number", "trials", ["sweep_id", "score", "number"])
    op.create_table(
        "rung_values",
        sa.Column("job_id", TEXT, nullable=False),
        sa.Column("rung", NUMBER, nullable=False),
        sa.Column("sweep_id", TEXT, nullable=False),
        sa.Column("score", sa.Float(53), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_rung_values_job_id_jobs")),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweeps.id"], name=op.f("fk_rung_values_sweep_id_sweeps")),
        sa.PrimaryKeyConstraint("job_id", "rung", name=op.f("pk_rung_values")),
    )
    op.create_index("ix_rung_values_sweep_id_rung_score", "rung_values", ["sweep_id", "rung", "score"])


def downgrade() -> None:
    """Trials stay as the jobs that they are."""
    op.drop_index("ix_jobs_sweep_id_state", table_name="jobs")
    op.drop_column("jobs", "sweep_id")
    for name in ("rung_values", "trials", "sweeps"):
        op.drop_table(name)
