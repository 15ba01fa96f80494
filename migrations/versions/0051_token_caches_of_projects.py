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

OWNERS = """
select key, min(project_id) from (
    select train_prepared as key, project_id from jobs where train_prepared is not null
    union all
    select valid_prepared as key, project_id from jobs where valid_prepared is not null
) named group by key
"""
OWN = """
update prepared set project_id = :project_id,
    num_bytes = coalesce((select num_bytes from artifacts where digest = prepared.artifact), 0)
where key = :key
"""
RECOUNT = """
update stored_bytes set num_bytes =
    coalesce((select sum(num_bytes) from files
        where files.project_id = stored_bytes.project_id and files.deleted_at is null), 0)
    + coalesce((select sum(artifacts.num_bytes) from adapters join artifacts on artifacts.digest = adapters.artifact
        where adapters.project_id = stored_bytes.project_id and adapters.deleted_at is null), 0)
"""


def upgrade() -> None:
    with op.batch_alter_table("prepared") as batch:
        batch.add_column(sa.Column("project_id", sa.String(255), nullable=True))
        batch.add_column(sa.Column("num_bytes", sa.BigInteger(), server_default="0", nullable=False))
        batch.add_column(sa.Column("evicted_at", sa.Float(53), nullable=True))
        batch.create_foreign_key("fk_prepared_project_id_projects", "projects", ["project_id"], ["id"])
    op.create_index("ix_prepared_project_id_file_digest", "prepared", ["project_id", "file_digest"])
    op.add_column("projects", sa.Column("max_plans_per_day", sa.BigInteger(), server_default="500", nullable=True))
    op.add_column("usage_days", sa.Column("num_plans", sa.BigInteger(), server_default="0", nullable=False))
    connection = op.get_bind()
    owners = [{"key": key, "project_id": project_id} for key, project_id in connection.execute(sa.text(OWNERS))]
    if owners:
        connection.execute(sa.text(OWN), owners)


def downgrade() -> None:
    """The version before counts files and adapters alone. A cache that was evicted is one that it makes again."""
    op.execute(RECOUNT)
    op.drop_column("usage_days", "num_plans")
    op.drop_column("projects", "max_plans_per_day")
    op.drop_index("ix_prepared_project_id_file_digest", table_name="prepared")
    with op.batch_alter_table("prepared") as batch:
        batch.drop_constraint("fk_prepared_project_id_projects", type_="foreignkey")
        batch.drop_column("evicted_at")
        batch.drop_column("num_bytes")
        batch.drop_column("project_id")
