"""What was added to files and jobs over time goes and comes again, and files and jobs stay, on both databases."""

from __future__ import annotations

from typing import Any

from alembic import command
from sqlalchemy import inspect, select

from catalog.db.database import Database, alembic_config
from catalog.settings import Settings
from catalog.storage import files, multipart_uploads
from catalog.storage.store import Blob
from catalog.tables.storage import File, Upload
from tests.catalog.world import Clock, World

BEFORE = "0009"
BEFORE_COUNTED = "0028"


def test_files_and_jobs_stay_where_expiry_result_files_and_uploads_in_parts_go_and_come(empty_url: str) -> None:
    database = Database(empty_url)
    database.migrate()
    world = World(database, Clock())
    claim = world.running()
    world.complete(claim.claim_id)
    with database.write() as session:
        session.get_one(File, world.file_id).expires_at = world.clock.now + 3600
    _begin_an_upload(world)

    command.downgrade(alembic_config(empty_url), BEFORE)
    with database.schema_connection() as connection:
        assert connection.exec_driver_sql("select id from jobs").scalars().all() == [claim.job.id]
        assert world.file_id in connection.exec_driver_sql("select id from files").scalars().all()
        assert not {"uploads", "upload_parts"} & set(inspect(connection).get_table_names())
    database.migrate()

    job, file = world.job(claim.job.id), files.get(database, project_id=world.caller.project_id, file_id=world.file_id)
    assert (job.state, job.result_file, file.expires_at) == ("succeeded", None, None)
    _begin_an_upload(world)
    command.check(alembic_config(empty_url))
    database.close()


def test_parts_of_uploads_that_became_no_file_are_counted_from_then_on(empty_url: str) -> None:
    database = Database(empty_url)
    database.migrate()
    world = World(database, Clock())
    for _ in range(2):
        _begin_an_upload(world)
    with database.write() as session:
        session.scalars(select(Upload).limit(1)).one().file_id = world.file_id

    command.downgrade(alembic_config(empty_url), BEFORE_COUNTED)
    database.migrate()

    with database.read() as session:
        found = {upload.file_id: upload.part_bytes for upload in session.scalars(select(Upload))}
    assert found == {world.file_id: 0, None: 1}
    command.check(alembic_config(empty_url))
    database.close()


def _begin_an_upload(world: World) -> None:
    settings, owner = Settings(), world.caller.project_id
    told: dict[str, Any] = {"purpose": "user_data", "filename": "a", "lifetime_seconds": None}
    begun = multipart_uploads.create(world.db, project_id=owner, num_bytes=1, **told, settings=settings)
    content = Blob(digest="0" * 64, num_bytes=1)
    multipart_uploads.record_part(
        world.db, project_id=owner, upload_id=begun.upload.id, content=content, settings=settings
    )
