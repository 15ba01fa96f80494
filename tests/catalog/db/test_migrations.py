"""The migrations make the tables of catalog/tables/, and unmake them, on both databases."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from sqlalchemy import inspect, select

from catalog.db.database import Database, alembic_config
from catalog.history import queries
from catalog.lifecycle import recording
from catalog.tables.history import Checkpoint
from catalog.tables.jobs import Job
from catalog.tables.table import Table
from tests.catalog.world import Clock, World, manifest

ROOT = Path(__file__).parents[3]
BEFORE_BLOCKS = "0017"
OLD_METRICS = sa.table(
    "metrics",
    *map(sa.column, ("job_id", "kind", "step", "created_at", "loss")),
    *map(sa.column, ("token_accuracy", "learning_rate", "grad_norm", "num_tokens")),
    sa.column("rewards", sa.JSON(none_as_null=True)),
)
TABLES = {table.name for table in Table.metadata.sorted_tables}


def tables(url: str) -> set[str]:
    database = Database(url)
    names = set(inspect(database.engine).get_table_names())
    database.close()
    return names


def test_up_makes_every_table_and_down_leaves_nothing(empty_url: str) -> None:
    database = Database(empty_url)

    database.migrate()
    command.check(alembic_config(empty_url))
    assert tables(empty_url) == TABLES | {"alembic_version"}

    command.downgrade(alembic_config(empty_url), "base")
    assert tables(empty_url) == {"alembic_version"}

    database.migrate()
    assert tables(empty_url) == TABLES | {"alembic_version"}
    database.close()


def test_several_processes_may_migrate_at_once(empty_url: str) -> None:
    def migrate(_: int) -> None:
        database = Database(empty_url)
        database.migrate()
        database.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(migrate, range(4)))

    assert tables(empty_url) == TABLES | {"alembic_version"}


def test_a_migration_keeps_the_rows_and_leaves_foreign_keys_enforced(empty_url: str) -> None:
    database = Database(empty_url)
    database.migrate()
    with database.schema_connection() as connection:
        connection.exec_driver_sql("insert into organizations (id, name, created_at) values ('p', 'p', 0)")

    database.migrate()

    with database.read() as session:
        connection = session.connection()
        assert connection.exec_driver_sql("select count(*) from organizations").scalar() == 1
        if database.is_sqlite:
            assert connection.exec_driver_sql("pragma foreign_keys").scalar() == 1
    database.close()


@pytest.mark.parametrize("words", [["upgrade", "head"], ["check"], ["upgrade", "head", "--sql"]])
def test_alembic_works_by_hand_on_the_database_of_the_settings(tmp_path: Path, words: list[str]) -> None:
    environment = {**os.environ, "LORRY_DATA_DIR": str(tmp_path)}
    environment.pop("LORRY_DATABASE_URL", None)
    alembic = [sys.executable, "-m", "alembic"]

    if words == ["check"]:
        subprocess.run([*alembic, "upgrade", "head"], cwd=ROOT, env=environment, check=True)
    done = subprocess.run([*alembic, *words], cwd=ROOT, env=environment, check=False, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "CREATE TABLE jobs" in done.stdout or (tmp_path / "lorry.db").exists()


def test_the_parent_of_jobs_comes_and_goes_and_the_jobs_stay(empty_url: str) -> None:
    database = Database(empty_url)
    database.migrate()
    job = World(database, Clock()).submit()

    command.downgrade(alembic_config(empty_url), "0004")
    with database.schema_connection() as connection:
        assert connection.exec_driver_sql("select id from jobs").scalars().all() == [job.id]
        assert "parent_adapter" not in {column["name"] for column in inspect(connection).get_columns("jobs")}
    database.migrate()

    with database.read() as session:
        kept = session.get_one(Job, job.id)
        assert (kept.parent_adapter, kept.spec) == (None, job.spec)
    command.check(alembic_config(empty_url))
    database.close()


def test_checkpoints_stay_where_their_copies_of_the_curves_come_and_go(empty_url: str) -> None:
    database = Database(empty_url)
    database.migrate()
    world = World(database, Clock())
    world.worker()
    claim = world.running()
    recording.record_checkpoint(database, claim.claim_id, step=3, artifact=manifest("c", kind="checkpoint"))

    command.downgrade(alembic_config(empty_url), "0005")
    with database.schema_connection() as connection:
        assert connection.exec_driver_sql("select step, metrics from checkpoints").one().step == 3
    database.migrate()

    with database.read() as session:
        assert [row.step for row in session.scalars(select(Checkpoint))] == [3]
    command.check(alembic_config(empty_url))
    database.close()


def test_jobs_that_wait_are_dated_by_when_they_came_into_the_queue(empty_url: str) -> None:
    database = Database(empty_url)
    database.migrate()
    world = World(database, Clock())
    queued, submitted = world.queued(), world.submit()
    undated = world.submit(suffix="old")
    with database.schema_connection() as connection:
        connection.exec_driver_sql(f"update jobs set state = 'queued', created_at = 7 where id = '{undated.id}'")

    command.downgrade(alembic_config(empty_url), "0012")
    with database.schema_connection() as connection:
        assert not {"queued_at", "own_bytes"} & {column["name"] for column in inspect(connection).get_columns("jobs")}
    database.migrate()

    assert queued.queued_at is not None
    dated = {job.id: job.queued_at for job in map(world.job, (queued.id, submitted.id, undated.id))}
    assert dated == {queued.id: queued.queued_at, submitted.id: None, undated.id: 7}
    command.check(alembic_config(empty_url))
    database.close()


def test_points_of_curves_are_packed_on_the_way_up_and_are_rows_again_on_the_way_down(empty_url: str) -> None:
    database = Database(empty_url)
    database.migrate()
    world = World(database, Clock())
    job = world.submit()
    points = [{"kind": "train", "step": step, "loss": 1 / step, "learning_rate": 1e-4} for step in range(1, 601)]
    points += [{"kind": "valid", "step": 7, "loss": 0.1 + 0.2, "num_tokens": 9, "rewards": {"margin": 1}}]

    command.downgrade(alembic_config(empty_url), BEFORE_BLOCKS)
    with database.schema_connection() as connection:
        for point in points:
            connection.execute(OLD_METRICS.insert().values(job_id=job.id, created_at=1.5, **point))
    database.migrate()

    of_job = world.of(job.id)
    train = queries.metrics(database, **of_job, kind="train")
    assert [(p.step, p.loss, p.learning_rate, p.grad_norm, p.created_at) for p in train] == [
        (step, 1 / step, 1e-4, None, 1.5) for step in range(1, 601)
    ]
    (valid,) = queries.metrics(database, **of_job, kind="valid")
    assert (valid.loss, valid.num_tokens, valid.rewards) == (0.1 + 0.2, 9, {"margin": 1})
    assert {point.step for point in queries.metrics(database, **of_job, kind="train", max_points=20)} >= {1, 600}
    command.downgrade(alembic_config(empty_url), BEFORE_BLOCKS)
    with database.schema_connection() as connection:
        rows = connection.execute(select(OLD_METRICS)).mappings().all()
    nothing = dict.fromkeys(("token_accuracy", "learning_rate", "grad_norm", "num_tokens", "rewards"))
    expected = [{"job_id": job.id, "created_at": 1.5, **nothing, **point} for point in points]
    assert sorted(map(dict, rows), key=lambda row: (row["kind"], row["step"])) == expected
    database.migrate()
    command.check(alembic_config(empty_url))
    database.close()
