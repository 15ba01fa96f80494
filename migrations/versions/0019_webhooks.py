"""Webhooks. Going down drops the endpoints, and what was not sent yet."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

TEXT = sa.String(length=255)
TIME = sa.Float(precision=53)
IS_DUE = sa.text("next_try_at IS NOT NULL")


def upgrade() -> None:
    op.create_table(
        "webhook_endpoints",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("project_id", TEXT, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("event_types", sa.JSON(), nullable=False),
        sa.Column("salt", TEXT, nullable=False),
        sa.Column("ending", TEXT, nullable=False),
        sa.Column("secret_made_at", TIME, nullable=False),
        sa.Column("previous_salt", TEXT, nullable=True),
        sa.Column("previous_ending", TEXT, nullable=True),
        sa.Column("previous_until", TIME, nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.Column("failing_since", TIME, nullable=True),
        sa.Column("disabled_at", TIME, nullable=True),
        sa.Column("disabled_reason", TEXT, nullable=True),
        sa.Column("deleted_at", TIME, nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name="fk_webhook_endpoints_project_id_projects"),
        sa.PrimaryKeyConstraint("id", name="pk_webhook_endpoints"),
    )
    of_a_project = ["project_id", "created_at", "id"]
    op.create_index("ix_webhook_endpoints_project_id_created_at_id", "webhook_endpoints", of_a_project)
    _create_deliveries()
    op.create_table(
        "webhook_tries",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("delivery_id", TEXT, nullable=False),
        sa.Column("started_at", TIME, nullable=False),
        sa.Column("seconds", TIME, nullable=False),
        sa.Column("status_code", sa.Integer(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("reply", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["delivery_id"], ["webhook_deliveries.id"], name="fk_webhook_tries_delivery_id_webhook_deliveries"
        ),
        sa.PrimaryKeyConstraint("seq", name="pk_webhook_tries"),
    )
    op.create_index("ix_webhook_tries_delivery_id", "webhook_tries", ["delivery_id"])


def _create_deliveries() -> None:
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("endpoint_id", TEXT, nullable=False),
        sa.Column("event_id", TEXT, nullable=False),
        sa.Column("event_type", TEXT, nullable=False),
        sa.Column("event_at", TIME, nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("status", TEXT, nullable=False),
        sa.Column("is_test", sa.Boolean(), nullable=False),
        sa.Column("num_tries", sa.Integer(), nullable=False),
        sa.Column("num_tries_before", sa.Integer(), nullable=False),
        sa.Column("next_try_at", TIME, nullable=True),
        sa.Column("claim_id", TEXT, nullable=True),
        sa.Column("ended_at", TIME, nullable=True),
        sa.ForeignKeyConstraint(
            ["endpoint_id"], ["webhook_endpoints.id"], name="fk_webhook_deliveries_endpoint_id_webhook_endpoints"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_webhook_deliveries"),
    )
    of_an_endpoint = ["endpoint_id", "created_at", "id"]
    op.create_index("ix_webhook_deliveries_endpoint_id_created_at_id", "webhook_deliveries", of_an_endpoint)
    due: dict[str, Any] = {"sqlite_where": IS_DUE, "postgresql_where": IS_DUE}
    op.create_index("ix_webhook_deliveries_due", "webhook_deliveries", ["next_try_at"], **due)
    op.create_index("ix_webhook_deliveries_turn", "webhook_deliveries", ["endpoint_id", "next_try_at"], **due)


def downgrade() -> None:
    op.drop_table("webhook_tries")
    op.drop_table("webhook_deliveries")
    op.drop_table("webhook_endpoints")
