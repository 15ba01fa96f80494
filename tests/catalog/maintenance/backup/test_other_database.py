"""A backup of SQLite and a folder is restored into PostgreSQL and a bucket, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from catalog.audit import chain
from catalog.db.database import Database
from catalog.errors import Conflict
from catalog.fleet import workers
from catalog.lifecycle import recording, recovery
from catalog.maintenance.backup import database_dump
from catalog.maintenance.backup.commands import create, restore
from catalog.maintenance.backup.location import open_place
from catalog.queue import claiming
from catalog.settings import Settings
from catalog.storage.store import open_store
from catalog.tables.fleet import Worker, is_live
from catalog.tables.history import JobEvent
from catalog.tables.jobs import Job
from catalog.tables.table import Table
from catalog.tables.tenancy import Project
from catalog.tenancy import authentication, projects
from tests.catalog.backup_service import Service, blobs, content, opened, without_restores
from tests.catalog.world import LEASE, PEPPER, WIDE, manifest
from tests.services.s3 import new_bucket

NUM_ROWS = 4
TEXT = 'tab\t, line\n, backslash \\N \\t, quote ", \u00fc \U0001f69a'


def value(column: Any, number: int) -> Any:
    """Return a value of the column's type that differs between rows. Rows refer to the row with the same number."""
    if column.nullable and number == 0:
        return sa.null()
    for key in column.foreign_keys:
        return value(key.column, number)
    kind = column.type
    if isinstance(kind, sa.JSON):
        if column.nullable and number == 1:
            return sa.JSON.NULL
        return [{"digest": f"{number}", "text": TEXT, "none": None, "numbers": [2**53, 0.1 + number, 1e300]}]
    if isinstance(kind, sa.Boolean):
        return number % 2 == 0
    if isinstance(kind, sa.BigInteger):
        return 2**62 + number
    if isinstance(kind, sa.Integer):
        return 2**31 - 1 - number
    if isinstance(kind, sa.Float):
        return 1.8e9 + number / 7
    if isinstance(kind, sa.LargeBinary):
        return bytes(range(256)) + bytes([number])
    assert isinstance(kind, sa.String), f"the test has no value for columns of type {kind!r}"
    return f"{number} {column} {TEXT}"[: kind.length]


def fill(db: Database) -> None:
    with db.engine.begin() as connection:
        for table in Table.metadata.sorted_tables:
            for number in range(NUM_ROWS):
                row = {column: value(column, number) for column in table.c}
                connection.execute(sa.insert(table).values(row))


@pytest.fixture(params=["sqlite", "postgresql"])
def target_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'target' / 'lorry.db'}"
    return request.getfixturevalue("new_postgres_url")


@pytest.mark.both_databases
def test_each_row_of_each_table_is_the_same_in_either_database(db: Database, target_url: str, tmp_path: Path) -> None:
    fill(db)

    snapshot = database_dump.take(db, tmp_path / "dump")
    database_dump.restore(tmp_path / "dump", target_url)

    target = Database(target_url)
    found = content(target)
    assert found == content(db)
    assert {name: len(rows) for name, rows in found.items()} == dict.fromkeys(found, NUM_ROWS)
    assert snapshot.row_counts == {**dict.fromkeys(found, NUM_ROWS), "alembic_version": 1}
    target.close()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_numbers_of_new_rows_follow_those_of_the_backup(
    service: Service, new_postgres_url: str, tmp_path: Path
) -> None:
    job_id = service.running().job.id
    database_dump.take(service.world.db, tmp_path / "dump")
    with service.world.db.read() as session:
        last = session.scalar(sa.select(sa.func.max(JobEvent.seq)))

    database_dump.restore(tmp_path / "dump", new_postgres_url)

    db = Database(new_postgres_url)
    event = JobEvent(job_id=job_id, created_at=1.0, level="info", type="message", message="new")
    with db.write() as session:
        session.add(event)
    assert event.seq == (last or 0) + 1
    db.close()


@pytest.fixture
def many_machines(new_postgres_url: str, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Return the settings of a service on PostgreSQL and a bucket, both empty, with the pepper of the tests."""
    bucket = new_bucket(s3_endpoint)
    for name, setting in bucket.environment().items():
        monkeypatch.setenv(name, setting)
    return Settings(
        data_dir=tmp_path / "many",
        database_url=SecretStr(new_postgres_url),
        store_url=f"s3://{bucket.name}/lorry",
        pepper=SecretStr(PEPPER.current.decode()),
    )


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_service_moves_to_postgresql_and_a_bucket_and_back(
    service: Service, many_machines: Settings, tmp_path: Path
) -> None:
    world, key = service.world, new_key(service)
    service.finish(service.running(), "adapter one")
    claim = service.running()
    service.put_artifact("checkpoint", kind="checkpoint")
    artifact = manifest("checkpoint", kind="checkpoint")
    recording.record_checkpoint(world.db, claim.claim_id, step=7, artifact=artifact)
    chain.seal(world.db, pepper=PEPPER.current)
    service.backup()

    there = restore(many_machines, service.place)

    db, store = opened(many_machines), open_store(many_machines)
    assert there.checked.problems == []
    assert there.local_sources == {"smol": "/models/smol"}
    assert without_restores(content(db)) == content(world.db)
    assert blobs(store.objects) == blobs(service.store.objects)
    assert authentication.authenticate(db, secret=key, pepper=PEPPER).project_id == world.caller.project_id
    assert chain.seal(db, pepper=PEPPER.current) == 1

    bucket_place = open_place(f"{many_machines.store_url}-backups", is_new=True)
    create(db, store, bucket_place, work_dir=many_machines.work_dir(), peppers=PEPPER.all())
    copy = Settings(data_dir=tmp_path / "copy", pepper=many_machines.pepper)
    back = restore(copy, bucket_place)

    copied = opened(copy)
    assert back.checked.problems == []
    assert back.checked.num_audit_events == there.checked.num_audit_events + 1
    assert without_restores(content(copied)) == without_restores(content(db))
    assert blobs(open_store(copy).objects) == blobs(store.objects)
    copied.close()
    db.close()


def new_key(service: Service) -> str:
    _, key = authentication.create(
        service.world.db, project_id=service.world.caller.project_id, name="before the move", pepper=PEPPER
    )
    return key


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_worker_of_the_old_machine_is_lost_and_another_continues_its_job(
    service: Service, many_machines: Settings
) -> None:
    world, claim = service.world, service.running()
    service.backup()
    restore(many_machines, service.place)
    db = Database(many_machines.resolved_database_url(), clock=world.clock)

    for _ in range(10):
        world.clock.advance(LEASE / 4)
        recovery.expire(db, lease_seconds=LEASE)

    with db.read() as session:
        assert session.scalars(sa.select(Worker.id).where(is_live(now=world.clock()))).all() == []
        assert session.get_one(Job, claim.job.id).claim_id is None
    workers.register_worker(db, worker_id="w2", host="there", pid=1, devices=[], version="1", memory_bytes=10**12)
    (again,) = claiming.claim_pack(db, worker_id="w2", trainer_id="t2", capacity=WIDE, lease_seconds=LEASE)
    assert (again.job.id, again.attempt) == (claim.job.id, 2)
    db.close()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_restore_with_another_pepper_is_refused_before_anything_is_copied(
    service: Service, many_machines: Settings
) -> None:
    service.backup()
    wrong = many_machines.model_copy(update={"pepper": SecretStr("another pepper, which is long enough")})

    with pytest.raises(Conflict) as refused:
        restore(wrong, service.place)

    assert refused.value.code == "backup_incompatible"
    assert blobs(open_store(wrong).objects) == {}
    assert restore(many_machines, service.place).checked.problems == []


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_restore_with_another_pepper_than_a_backup_without_one_is_reported(
    service: Service, elsewhere: Settings
) -> None:
    """Backups of the container deployments run without the pepper."""
    chain.seal(service.world.db, pepper=PEPPER.current)
    service.backup(peppers=[])
    wrong = elsewhere.model_copy(update={"pepper": SecretStr("another pepper, which is long enough")})

    restored = restore(wrong, service.place)

    (problem,) = restored.checked.problems
    assert problem.startswith("The audit chain is broken at link 1 ")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_value_that_postgresql_rejects_is_named_and_the_database_stays_empty(
    service: Service, many_machines: Settings
) -> None:
    project = projects.create(service.world.db, "too-long")
    with service.world.db.write() as session:
        session.get_one(Project, project.id).name = "x" * 300
    service.backup()

    with pytest.raises(Conflict, match=r"a row of table projects .* too long.*column name") as refused:
        restore(many_machines, service.place)

    assert refused.value.code == "database_damaged"
    assert refused.value.message.endswith(". The database was not changed.")
    database_dump.check_empty(many_machines.resolved_database_url())
