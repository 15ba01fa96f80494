"""Restores: rejected targets and backups, and the checks of a database after a restore and by `verify`."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import delete, func, make_url, select, text
from sqlalchemy.orm import Session

from catalog.audit import chain
from catalog.db import revisions
from catalog.db.database import Database
from catalog.errors import Conflict
from catalog.maintenance import audit_anchors
from catalog.maintenance.backup import database_dump, integrity
from catalog.maintenance.backup.commands import create, restore, verify
from catalog.maintenance.backup.location import BackupRecord
from catalog.settings import Settings
from catalog.storage.object_storage import Objects
from catalog.tables.history import JobEvent
from catalog.tables.table import Table
from catalog.tables.tenancy import AuditEvent, AuditHead, Project
from catalog.tenancy import projects
from tests import next_migration
from tests.catalog.backup_service import Service, content, opened
from tests.catalog.world import PEPPER, World
from tests.next_migration import NEXT
from tests.services.postgres import as_role

DAY = 24 * 3600.0
UNSEALS = """
    op.execute("update audit_events set link = null, previous = null, digest = null")
    op.execute("delete from audit_head")
"""


def sqlite_path(settings: Settings) -> Path:
    return Path(make_url(settings.resolved_database_url()).database or "")


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_restore_rejects_a_leftover_sqlite_file_and_names_it(
    service: Service, elsewhere: Settings, suffix: str
) -> None:
    service.backup()
    leftover = Path(f"{sqlite_path(elsewhere)}{suffix}")
    leftover.parent.mkdir()
    leftover.write_bytes(b"pages of an earlier database")

    with pytest.raises(Conflict) as refused:
        restore(elsewhere, service.place)

    assert refused.value.code == "database_not_empty"
    assert refused.value.message.startswith(f"The database file {leftover} already exists, ")
    assert "Move the file to another folder" in refused.value.remedy
    assert leftover.read_bytes() == b"pages of an earlier database"
    assert not sqlite_path(elsewhere).exists()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_log_of_a_crashed_service_does_not_reach_the_restored_database(
    service: Service, elsewhere: Settings, tmp_path: Path
) -> None:
    """After a crash, an operator moves the damaged database away and restores, but the WAL files stay behind."""
    service.backup()
    projects.ensure(service.world.db, "made-after-the-backup")
    live = Path(str(service.world.db.engine.url.database))
    path = sqlite_path(elsewhere)
    path.parent.mkdir()
    aside = tmp_path / "moved away"
    aside.mkdir()
    shutil.copy(f"{live}-wal", f"{path}-wal")
    shutil.copy(f"{live}-shm", f"{path}-shm")

    with pytest.raises(Conflict) as refused:
        restore(elsewhere, service.place)
    for suffix in ("-wal", "-shm"):
        assert f"{path}{suffix}" in refused.value.message
        shutil.move(f"{path}{suffix}", aside)
    restored = restore(elsewhere, service.place)

    assert restored.checked.problems == []
    db = opened(elsewhere)
    with db.read() as session:
        assert "made-after-the-backup" not in set(session.scalars(select(Project.name)))
    db.close()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_database_that_appears_during_a_restore_is_not_replaced(
    service: Service, elsewhere: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.backup()
    fetch = service.place.fetch_dump

    def fetch_while_a_service_starts(record: BackupRecord, into: Path) -> None:
        fetch(record, into)
        sqlite_path(elsewhere).write_bytes(b"a new service's database")

    monkeypatch.setattr(service.place, "fetch_dump", fetch_while_a_service_starts)

    with pytest.raises(Conflict, match="already"):
        restore(elsewhere, service.place)

    assert sqlite_path(elsewhere).read_bytes() == b"a new service's database"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_bootstrap_during_a_restore_into_postgresql_is_reported_and_nothing_is_filled(
    service: Service, elsewhere: Settings, new_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.backup()
    elsewhere = elsewhere.model_copy(update={"database_url": SecretStr(new_postgres_url)})
    fetch = service.place.fetch_dump

    def fetch_while_another_process_migrates(record: BackupRecord, into: Path) -> None:
        fetch(record, into)
        db = opened(elsewhere)
        db.migrate()
        db.close()

    monkeypatch.setattr(service.place, "fetch_dump", fetch_while_another_process_migrates)

    with pytest.raises(Conflict) as refused:
        restore(elsewhere, service.place)

    assert refused.value.code == "database_not_empty"
    assert refused.value.message.startswith(f"The database {make_url(new_postgres_url).render_as_string()} already")
    db = opened(elsewhere)
    assert not any(content(db).values())
    db.close()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_draft_left_by_a_killed_restore_is_not_written_through(service: Service, elsewhere: Settings) -> None:
    """A restore that is killed between linking and removing the draft leaves two names of the live database."""
    service.backup()
    path = sqlite_path(elsewhere)
    path.parent.mkdir()
    path.write_bytes(b"the live database")
    os.link(path, path.with_name(f".{path.name}-restored"))
    moved = path.rename(path.with_name("moved away"))

    restore(elsewhere, service.place)

    assert moved.read_bytes() == b"the live database"


def test_older_backup_is_checked_against_its_record_before_migration(
    service: Service, elsewhere: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The migration changes the compared values: the revision, the number of rows, and the end of the audit chain."""
    older = revisions.newest()
    chain.seal(service.world.db, pepper=PEPPER.current)
    record = service.backup()
    next_migration.install(tmp_path / "scripts", monkeypatch, upgrade=UNSEALS, downgrade="    pass")

    restored = restore(elsewhere, service.place)

    assert (record.revision, restored.checked.problems) == (older, [])
    assert record.audit_link > 0
    db = opened(elsewhere)
    with db.read() as session:
        assert revisions.read(session) == NEXT
        assert session.scalar(select(func.count()).select_from(AuditHead)) == 0
    db.close()


def test_restored_chain_must_end_as_the_backup_recorded(service: Service, elsewhere: Settings) -> None:
    chain.seal(service.world.db, pepper=PEPPER.current)
    service.backup()
    (path,) = (service.folder / "backups" / "backups").glob("*/backup.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "audit_digest": "0" * 64}))

    with pytest.raises(Conflict, match="of the audit chain differs") as refused:
        restore(elsewhere, service.place)

    assert refused.value.code == "database_damaged"


def with_the_old_store(service: Service, elsewhere: Settings) -> Settings:
    """Return settings with a new database and with the store and the pepper of the service."""
    store_url = (service.folder / "store").as_uri()
    return elsewhere.model_copy(update={"store_url": store_url, "pepper": SecretStr(PEPPER.current.decode())})


def test_anchors_of_events_lost_by_a_restore_are_moved_and_reported(
    service: Service, elsewhere: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database was lost and the store was kept. Later tampering must not hide behind old anchors."""
    world, objects = service.world, service.store.objects
    monkeypatch.setattr(database_dump, "read_clock", lambda _: world.clock())
    keeps = with_the_old_store(service, elsewhere)
    kept = anchored(world, objects, "before")
    record = service.backup()
    world.clock.advance(DAY)
    lost = anchored(world, objects, "after")

    restored = restore(keeps, service.place)

    assert (restored.checked.problems, restored.superseded_anchors) == ([], [lost])
    assert [entry.key for entry in objects.list_all(audit_anchors.PREFIX)] == [kept]
    (moved,) = [entry.key for entry in objects.list_all(audit_anchors.SUPERSEDED_PREFIX)]
    assert moved.endswith(lost.removeprefix(audit_anchors.PREFIX))
    db = opened(keeps)
    with db.write() as session:
        restored_event = session.scalars(select(AuditEvent).where(AuditEvent.type == "service.restored")).one()
        assert restored_event.details["superseded_anchors"] == [{"key": lost, "link": record.audit_link + 1}]
        session.scalars(select(AuditEvent).where(AuditEvent.link == 1)).one().actor_name = "another actor"
    assert "is broken at link 1 " in str(verify(db, service.store, peppers=PEPPER.all()).problems)
    db.close()


def test_anchor_mismatch_from_before_the_backup_is_still_reported(
    service: Service, elsewhere: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log was truncated before the backup. A restore does not hide that."""
    world, objects = service.world, service.store.objects
    monkeypatch.setattr(database_dump, "read_clock", lambda _: world.clock())
    keeps = with_the_old_store(service, elsewhere)
    name = anchored(world, objects, "cut-off")
    with world.db.write() as session:
        head = session.get_one(AuditHead, 1)
        session.execute(delete(AuditEvent).where(AuditEvent.link == head.link))
        cut, head.link = head.link, head.link - 1
        head.digest = session.scalar(select(AuditEvent.digest).where(AuditEvent.link == head.link)) or ""
    world.clock.advance(1.0)
    service.backup()

    restored = restore(keeps, service.place)

    assert restored.checked.problems == [f"The audit chain is broken at link {cut}: missing."]
    assert restored.superseded_anchors == []
    assert [entry.key for entry in objects.list_all(audit_anchors.PREFIX)] == [name]


def anchored(world: World, objects: Objects, project: str) -> str:
    """Create a project and seal its event. Returns the name of the day's anchor."""
    projects.create(world.db, project)
    chain.seal(world.db, pepper=PEPPER.current)
    assert audit_anchors.anchor(world.db, objects, pepper=PEPPER.current)
    return max(entry.key for entry in objects.list_all(audit_anchors.PREFIX))


def test_backup_records_row_counts_of_each_table(service: Service) -> None:
    record = service.backup()

    counts = record.row_counts
    assert (counts["projects"], counts["alembic_version"]) == (2, 1)
    assert set(counts) >= {table.name for table in Table.metadata.sorted_tables}
    assert service.place.find(record.name) == record


def test_restore_reports_differences_from_the_recorded_backup(service: Service, elsewhere: Settings) -> None:
    service.backup()
    (path,) = (service.folder / "backups" / "backups").glob("*/backup.json")
    changed = json.loads(path.read_text())
    changed["row_counts"] = {**changed["row_counts"], "projects": 12_345, "alembic_version": 0}
    path.write_text(json.dumps(changed))

    with pytest.raises(Conflict) as refused:
        restore(elsewhere, service.place)

    assert refused.value.code == "database_damaged"
    name = make_url(elsewhere.resolved_database_url()).database
    assert refused.value.message.startswith(f"The restored database {name} does not match backup ")
    assert f" {name}" in refused.value.remedy
    assert "projects has 2 rows, but the backup recorded 12,345." in refused.value.message
    assert "alembic_version has 1 row, but the backup recorded 0." in refused.value.message
    assert "Do not start the service" in refused.value.remedy


def orphan(world: World) -> None:
    """Insert an event of a missing job while foreign keys are not enforced."""
    row = JobEvent(job_id="ftjob-none", level="info", type="message", message="orphan", created_at=1.0)
    with world.db.engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        driver.execute("PRAGMA foreign_keys=OFF" if world.db.is_sqlite else "set session_replication_role = replica")
        with Session(connection) as session:
            session.add(row)
            session.flush()
            connection.commit()
        connection.invalidate()


def test_check_reports_rows_that_refer_to_missing_rows(service: Service) -> None:
    orphan(service.world)

    (problem,) = verify(service.world.db, service.store, peppers=PEPPER.all()).problems

    assert "events" in problem
    assert "jobs" in problem
    assert "1 row" in problem


def damage(db: Database, table: str) -> None:
    """Overwrite the first page of the table with 0xff. On PostgreSQL, the table must be empty."""
    if db.is_sqlite:
        with db.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            pages = text("select rootpage from sqlite_master where name = :name")
            root = connection.execute(pages, {"name": table}).scalar_one()
            size = connection.exec_driver_sql("PRAGMA page_size").scalar_one()
        db.close()
        with Path(str(db.engine.url.database)).open("rb+") as file:
            file.seek((root - 1) * size)
            file.write(b"\xff" * size)
        return
    with db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"truncate {table} cascade"))  # creates a new file, of which the server caches no page
        page = connection.execute(text("select lo_from_bytea(0, decode(repeat('ff', 8192), 'hex'))")).scalar_one()
        connection.execute(text("select lo_export(:page, pg_relation_filepath(:name))"), {"page": page, "name": table})


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_check_reports_damaged_pages(service: Service) -> None:
    damage(service.world.db, "projects")

    checked = verify(service.world.db, service.store, peppers=PEPPER.all())

    assert checked.problems
    assert checked.problems[0].startswith("The database is damaged:")


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_check_reports_an_invalid_index(service: Service) -> None:
    set_valid = "update pg_index set indisvalid = {} where indexrelid = 'pk_projects'::regclass"
    with service.world.db.engine.begin() as connection:
        connection.execute(text(set_valid.format("false")))
    try:
        problems = verify(service.world.db, service.store, peppers=PEPPER.all()).problems
    finally:
        with service.world.db.engine.begin() as connection:
            connection.execute(text(set_valid.format("true")))

    assert problems == ["The database is damaged: the index pk_projects is not valid."]


@pytest.mark.both_databases
@pytest.mark.parametrize("table", ["artifacts", "events"])
def test_backup_of_a_damaged_database_is_rejected(service: Service, table: str) -> None:
    damage(service.world.db, table)

    with pytest.raises(Conflict, match="is damaged: ") as refused:
        service.backup()

    assert refused.value.code == "database_damaged"
    assert service.world.db.engine.url.render_as_string() in refused.value.message


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_tables_of_another_owner_are_not_backed_up_and_do_not_block(
    service: Service, elsewhere: Settings, tmp_path: Path
) -> None:
    db = service.world.db
    owner, another = (f"{name}_{secrets.token_hex(4)}" for name in ("backup", "another"))
    with db.engine.begin() as connection:
        connection.execute(text("create table of_another (x int)"))
        connection.execute(text(f"create role {owner} login"))
        connection.execute(text(f"create role {another}"))
        connection.execute(text(f"grant usage on schema public to {owner}"))
        for name in [*Table.metadata.tables, "alembic_version"]:
            connection.execute(text(f"grant select on {name} to {owner}"))
        connection.execute(text(f"grant select on all sequences in schema public to {owner}"))
        connection.execute(text('create table "By ""another.*" (x int)'))
        for name in ("of_another", '"By ""another.*"'):
            connection.execute(text(f"alter table {name} owner to {another}"))
    reader = Database(as_role(db.url, owner))
    try:
        made = create(reader, service.store, service.place, work_dir=tmp_path / "work", peppers=PEPPER.all())
        assert "of_another" not in made.record.row_counts
        assert integrity.damage(reader) == integrity.orphans(reader) == []
    finally:
        reader.close()
        with db.engine.begin() as connection:
            connection.execute(text(f"drop owned by {owner}, {another}"))
            connection.execute(text(f"drop role {owner}, {another}"))
    assert restore(elsewhere, service.place).checked.problems == []
