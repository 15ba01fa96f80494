"""Token caches belong to one project and are charged to it, and a project has a limit of plans a day.

A cache that jobs name becomes their project's, so that their records and their training stay as they are. (Of jobs of
several projects: the first by id. The others read it by its key all the same.) The rest stays without a project: no new
job finds it, for keys contain the project now, and the daily cleaning deletes it. What is charged from now on, and was
there before, is counted by the next cleaning.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0051"
down_revision = "0050"
branch_labels = None
depends_on = None

OWN = """
update prepared set project_id = named.project_id,
    num_bytes = coalesce((select num_bytes from artifacts where digest = prepared.artifact), 0)
from (
    select key, min(project_id) as project_id from (
        select train_prepared as key, project_id from jobs where train_prepared is not null
        union all
        select valid_prepared as key, project_id from jobs where valid_prepared is not null
    ) used group by key
) named
where named.key = prepared.key
"""
FOREIGN_KEY = "fk_prepared_project_id_projects"
RECOUNT = """
update stored_bytes set num_bytes =
    coalesce((select sum(num_bytes) from files
        where files.project_id = stored_bytes.project_id and files.deleted_at is null), 0)
    + coalesce((select sum(artifacts.num_bytes) from adapters join artifacts on artifacts.digest = adapters.artifact
        where adapters.project_id = stored_bytes.project_id and adapters.deleted_at is null), 0)
"""


def upgrade() -> None:
    if _is_sqlite():  # no batch: it would read the table, which `alembic upgrade --sql` cannot
        refers = f"constraint {FOREIGN_KEY} references projects (id)"
        op.execute(f"alter table prepared add column project_id varchar(255) {refers}")
    else:
        op.add_column("prepared", sa.Column("project_id", sa.String(255), nullable=True))
        op.create_foreign_key(FOREIGN_KEY, "prepared", "projects", ["project_id"], ["id"])
    op.add_column("prepared", sa.Column("num_bytes", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("prepared", sa.Column("evicted_at", sa.Float(53), nullable=True))
    op.create_index("ix_prepared_project_id_file_digest", "prepared", ["project_id", "file_digest"])
    op.add_column("projects", sa.Column("max_plans_per_day", sa.BigInteger(), server_default="500", nullable=True))
    op.add_column("usage_days", sa.Column("num_plans", sa.BigInteger(), server_default="0", nullable=False))
    op.execute(OWN)


def downgrade() -> None:
    """The version before counts files and adapters alone. A cache that was evicted is one that it makes again."""
    op.execute(RECOUNT)
    op.drop_column("usage_days", "num_plans")
    op.drop_column("projects", "max_plans_per_day")
    op.drop_index("ix_prepared_project_id_file_digest", table_name="prepared")
    if not _is_sqlite():
        op.drop_constraint(FOREIGN_KEY, "prepared", type_="foreignkey")
    with op.batch_alter_table("prepared") as batch:
        batch.drop_column("evicted_at")
        batch.drop_column("num_bytes")
        batch.drop_column("project_id")


def _is_sqlite() -> bool:
    return op.get_context().dialect.name == "sqlite"
