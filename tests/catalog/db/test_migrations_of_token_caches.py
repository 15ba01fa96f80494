"""Token caches get an owner on the way up, and the counters of stored bytes are those of the version before on the way
down."""

from __future__ import annotations

from alembic import command
from sqlalchemy import select

from catalog.db.database import Database, alembic_config
from catalog.maintenance import garbage_collection
from catalog.storage import token_cache
from catalog.tables.jobs import Job
from catalog.tables.storage import Artifact, Prepared
from catalog.tables.usage import StoredBytes
from catalog.usage import stored_bytes
from tests.catalog.world import Clock, World, manifest, sha

BEFORE = "0050"


def test_a_cache_that_a_job_names_becomes_its_projects_and_the_others_are_cleaned(empty_url: str) -> None:
    database = Database(empty_url)
    database.migrate()
    world = World(database, Clock())
    job = world.queued()
    key = job.train_prepared or ""
    world.put_tokens("unused", file_digest=sha(world.file_id), artifact=manifest("more", "tokens"), report={})
    stored_bytes.reconcile(database)

    command.downgrade(alembic_config(empty_url), BEFORE)
    database.migrate()
    with database.read() as session:
        owners = {row.key: row.project_id for row in session.scalars(select(Prepared))}
        (num_bytes,) = session.scalars(select(Artifact.num_bytes).join(Prepared).where(Prepared.key == key))
    stored_bytes.reconcile(database)
    garbage_collection.let_go(database)

    assert owners == {key: world.caller.project_id, "unused": None}
    assert token_cache.get(database, "unused") is None
    kept = token_cache.get(database, key)
    assert kept is not None
    assert (kept.artifact is not None, kept.num_bytes) == (True, num_bytes)
    with database.read() as session:
        assert session.get_one(Job, job.id).train_prepared == key
        counted = session.get_one(StoredBytes, world.caller.project_id).num_bytes
    assert counted == num_bytes + 10  # the file's
    command.check(alembic_config(empty_url))
    database.close()


def test_on_the_way_down_files_and_adapters_alone_are_counted(empty_url: str) -> None:
    database = Database(empty_url)
    database.migrate()
    world = World(database, Clock())
    stored_bytes.reconcile(database)
    adapter = world.complete(world.running().claim_id, "adapter")

    command.downgrade(alembic_config(empty_url), BEFORE)

    with database.schema_connection() as connection:
        (counted,) = connection.exec_driver_sql("select num_bytes from stored_bytes").scalars()
        files = connection.exec_driver_sql("select sum(num_bytes) from files").scalar_one()
    assert counted == files + len("adapter")
    assert adapter.project_id == world.caller.project_id
    database.close()
