"""Organizations, each with projects of its own. All projects that there are go into one, `default`."""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import context, op
from alembic.util import CommandError

revision = "0030"
down_revision = "0029"
branch_labels = None
depends_on = None

TEXT, NUMBER, TIME = sa.String(255), sa.BigInteger(), sa.Float(53)
NAME_OF_KEY = "fk_projects_organization_id_organizations"
PROJECTS = sa.Table(
    "projects",
    sa.MetaData(),
    sa.Column("id", TEXT, nullable=False),
    sa.Column("name", TEXT, nullable=False),
    sa.Column("created_at", TIME, nullable=False),
    sa.Column("archived_at", TIME, nullable=True),
    sa.Column("preparing_at", TIME, nullable=True),
    sa.Column("weight", TIME, nullable=False, server_default="1"),
    sa.Column("created_by", TEXT, nullable=True),
    sa.Column("max_concurrent_jobs", NUMBER, nullable=True),
    sa.Column("max_queued_jobs", NUMBER, nullable=True),
    sa.Column("max_jobs_per_day", NUMBER, nullable=True),
    sa.Column("max_stored_bytes", NUMBER, nullable=True),
    sa.Column("max_device_hours_per_month", TIME, nullable=True),
    sa.Column("organization_id", TEXT, nullable=True),
    sa.PrimaryKeyConstraint("id", name="pk_projects"),
    sa.UniqueConstraint("name", name="uq_projects_name"),
)
"""As it is in between: SQLite makes a table anew to change it, and can't look at it where the SQL is only printed."""
DEFAULT = """
INSERT INTO organizations (id, name, created_at)
SELECT :id, 'default', oldest.created_at FROM (SELECT MIN(created_at) AS created_at FROM projects) AS oldest
WHERE oldest.created_at IS NOT NULL
"""


def upgrade() -> None:
    """Where there is no project yet, the first one makes its organization itself."""
    op.create_table(
        "organizations",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("created_by", TEXT, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_organizations")),
        sa.UniqueConstraint("name", name=op.f("uq_organizations_name")),
    )
    op.execute(sa.text(DEFAULT).bindparams(id=f"org-{secrets.token_hex(12)}"))
    op.add_column("projects", sa.Column("organization_id", TEXT, nullable=True))
    op.execute("UPDATE projects SET organization_id = (SELECT id FROM organizations)")
    with op.batch_alter_table("projects", copy_from=PROJECTS) as projects:
        projects.alter_column("organization_id", existing_type=TEXT, nullable=False)
        projects.create_foreign_key(op.f(NAME_OF_KEY), "organizations", ["organization_id"], ["id"])


def downgrade() -> None:
    """Raises CommandError where there are several: on the way up again their projects would all be in one."""
    if not context.is_offline_mode() and _count() > 1:
        raise CommandError(
            f"There are {_count()} organizations, and before revision {revision} there is none: who may see whose "
            "projects would be lost. Stay at this revision, or go back to a copy of the database from before it."
        )
    with op.batch_alter_table("projects") as projects:
        projects.drop_constraint(op.f(NAME_OF_KEY), type_="foreignkey")
        projects.drop_column("organization_id")
    op.drop_table("organizations")


def _count() -> int:
    return op.get_bind().scalar(sa.text("SELECT COUNT(*) FROM organizations")) or 0
