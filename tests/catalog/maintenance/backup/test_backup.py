"""A backup taken while the service works restores to one consistent state with all its files."""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from sqlalchemy import event, func, select

from catalog.audit import chain
from catalog.db import revisions
from catalog.db.database import Database
from catalog.errors import Conflict, InvalidRequest, NotFound
from catalog.fleet import workers
from catalog.lifecycle import recording, recovery
from catalog.maintenance import garbage_collection
from catalog.maintenance.backup import database_dump, location
from catalog.maintenance.backup.commands import create, restore, verify
from catalog.maintenance.backup.location import BACKUP_LEASE_SECONDS, BackupPlace, BackupRecord, open_place
from catalog.queue import claiming
from catalog.registry import adapters
from catalog.settings import Settings
from catalog.states import JobState
from catalog.storage.object_storage import CHUNK_BYTES, Objects
from catalog.storage.store import ArtifactStore, blob_key
from catalog.tables.history import Attempt
from catalog.tables.jobs import Job
from catalog.tables.storage import Adapter, Artifact
from catalog.tables.tenancy import AuditEvent
from tests.catalog.backup_service import Service, opened
from tests.catalog.world import LEASE, PEPPER, manifest, sha
from tests.next_migration import LATER, UNRELEASED


class HookedObjects(Objects):
    """An object store that calls `before` once, when the given key is about to be read."""

    def __init__(self, objects: Objects, key: str, before: Callable[[], None]) -> None:
        assert objects.folder is not None
        super().__init__(objects.folder.as_uri())
        self._key, self._before = key, before

    def read(self, key: str, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        if key == self._key:
            self._key = ""
            self._before()
        return super().read(key, chunk_bytes=chunk_bytes)


def test_restored_service_is_complete_and_verifies(service: Service, elsewhere: Settings) -> None:
    name = service.finish(service.running(), "adapter one")
    chain.seal(service.world.db, pepper=PEPPER.current)
    record = service.backup()

    restored = restore(elsewhere, service.place)

    assert restored.checked.problems == record.problems == []
    assert restored.checked.num_audit_events == record.audit_link > 0
    assert (restored.checked.num_artifacts, restored.checked.num_objects) == (2, record.num_objects)
    db = opened(elsewhere)
    assert adapters.get(db, project_id=service.world.caller.project_id, name=name).adapter.name == name
    with db.read() as session:
        recorded = session.scalars(select(AuditEvent).order_by(AuditEvent.seq.desc()).limit(1)).one()
    assert (recorded.type, recorded.object_id) == ("service.restored", record.name)
    assert recorded.details == {"taken_at": record.taken_at}
    db.close()


def test_backup_during_writes_deletions_and_cleanup_is_consistent(service: Service, elsewhere: Settings) -> None:
    records: list[BackupRecord] = []
    for number in range(3):
        service.finish(service.running(), f"before {number}")
    stop = Event()

    def work() -> int:
        number = 0
        while not stop.is_set() or number < 5:
            name = service.finish(service.running(), f"meanwhile {number}")
            if number % 2:
                service.delete(name)
            chain.seal(service.world.db, pepper=PEPPER.current)
            garbage_collection.clean(service.world.db, service.store)
            number += 1
        return number

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            records += [service.backup() for _ in range(4)]
        finally:
            stop.set()
        assert working.result() >= 5

    assert [record.problems for record in records] == [[]] * 4
    restored = restore(elsewhere, service.place, name=records[1].name)
    assert restored.checked.problems == []
    db = opened(elsewhere)
    with db.read() as session:
        ended = session.scalar(select(func.count()).where(Job.state == JobState.SUCCEEDED))
        assert ended == session.scalar(select(func.count()).select_from(Adapter))
        assert session.scalar(select(func.count()).where(Attempt.ended_at.is_(None))) in (0, 1)
    db.close()


def test_files_deleted_during_the_copy_do_no_harm(service: Service, elsewhere: Settings) -> None:
    old = service.finish(service.running(), "old adapter")
    service.finish(service.running(), "z adapter that stays")
    service.age()

    def let_go() -> None:
        service.delete(old)
        assert garbage_collection.clean(service.world.db, service.store) > 0
        service.finish(service.running(), "new adapter")

    stays = manifest("z adapter that stays").files[0].digest
    hooked = ArtifactStore(HookedObjects(service.store.objects, blob_key(stays), let_go))
    record = service.backup(hooked)

    assert record.problems == []
    assert restore(elsewhere, service.place).checked.problems == []
    db = opened(elsewhere)
    with db.read() as session:
        visible = set(session.scalars(select(Artifact.digest).where(Artifact.kind == "adapter")))
    db.close()
    assert visible == {manifest("new adapter").digest, manifest("z adapter that stays").digest}


def test_file_deleted_while_verify_reads_is_not_reported(service: Service) -> None:
    name = service.finish(service.running(), "old adapter")
    service.age()

    def let_go() -> None:
        service.delete(name)
        assert garbage_collection.clean(service.world.db, service.store) > 0

    blob = blob_key(manifest("old adapter").files[0].digest)
    hooked = ArtifactStore(HookedObjects(service.store.objects, blob, let_go))

    assert verify(service.world.db, hooked, peppers=PEPPER.all()).problems == []
    assert not (service.folder / "store" / blob).exists()


def test_jobs_running_at_the_backup_are_recovered_by_their_leases(service: Service, elsewhere: Settings) -> None:
    claim = service.running()
    recording.record_checkpoint(service.world.db, claim.claim_id, step=7, artifact=kept(service, "checkpoint"))
    service.backup()
    service.finish(claim, "ended after the backup")
    restore(elsewhere, service.place)
    world = service.world
    world.clock.advance(10 * LEASE)
    db = Database(elsewhere.resolved_database_url(), clock=world.clock)

    assert recovery.expire(db, lease_seconds=LEASE) == 0, "no worker could renew its lease: a grace period applies"
    for _ in range(9):
        world.clock.advance(LEASE / 4)
        recovery.expire(db, lease_seconds=LEASE)

    with db.read() as session:
        job = session.get_one(Job, claim.job.id)
        assert (job.state, job.claim_id) == (JobState.QUEUED, None)
    workers.register_worker(db, worker_id="w2", host="there", pid=1, devices=[], version="1", memory_bytes=10**12)
    arguments = {"capacity": world_capacity(), "lease_seconds": LEASE}
    (again,) = claiming.claim_pack(db, worker_id="w2", trainer_id="trainer-2", **arguments)
    assert (again.job.id, again.attempt) == (claim.job.id, 2)
    db.close()


def kept(service: Service, text: str) -> Any:
    service.put_artifact(text, kind="checkpoint")
    return manifest(text, kind="checkpoint")


def world_capacity() -> Any:
    from tests.catalog.world import WIDE

    return WIDE


def test_damaged_file_is_reported_by_backup_and_verify(service: Service, elsewhere: Settings) -> None:
    name = service.finish(service.running(), "to be damaged")
    blob = service.folder / "store" / blob_key(sha("to be damaged"))
    blob.write_bytes(b"something else")

    record = service.backup()
    restored = restore(elsewhere, service.place)

    assert record.problems == [f"The content of {blob_key(sha('to be damaged'))} has changed."]
    assert restored.checked.problems == [f"{name}: {blob_key(sha('to be damaged'))} is missing."]
    here = verify(service.world.db, service.store, peppers=PEPPER.all()).problems
    assert here == [f"{name}: {record.problems[0]}"]


def test_changed_audit_log_is_reported(service: Service, elsewhere: Settings) -> None:
    chain.seal(service.world.db, pepper=PEPPER.current)
    service.backup()
    restore(elsewhere, service.place)
    db = opened(elsewhere)
    with db.write() as session:
        first = session.scalars(select(AuditEvent).where(AuditEvent.link == 1)).one()
        first.details = {"name": "another name"}
        ident = first.id

    problems = verify(db, service.store, peppers=PEPPER.all()).problems
    assert problems == [f"The audit chain is broken at link 1 ({ident}): changed."]
    db.close()


def test_incremental_backups_copy_only_new_files_and_prune_old_ones(service: Service) -> None:
    first_name = service.finish(service.running(), "first adapter")
    first = create(
        service.world.db, service.store, service.place, work_dir=service.folder / "work", peppers=PEPPER.all()
    )
    service.delete(first_name)
    garbage_collection.drop_references(service.world.db)
    service.finish(service.running(), "second adapter")

    second = create(
        service.world.db, service.store, service.place, work_dir=service.folder / "work", peppers=PEPPER.all(), keep=1
    )

    assert first.num_copied > second.num_copied == 3, "the adapter, its manifest and its curves"
    assert second.forgotten == [first.record.name]
    assert [record.name for record in service.place.records()] == [second.record.name]
    stored = {entry.key for entry in service.place.store.list_all("blobs")}
    assert blob_key(sha("second adapter")) in stored
    assert blob_key(sha("first adapter")) not in stored


def test_concurrent_backup_to_the_same_location_is_rejected(service: Service) -> None:
    service.finish(service.running(), "adapter")
    refused: list[Conflict] = []

    def begin_another() -> None:
        with pytest.raises(Conflict) as caught:
            service.backup(keep=1)
        refused.append(caught.value)

    blob = blob_key(manifest("adapter").files[0].digest)
    record = service.backup(ArtifactStore(HookedObjects(service.store.objects, blob, begin_another)))

    (error,) = refused
    assert error.code == "backup_running"
    assert f"(process {os.getpid()} on host " in error.message
    assert re.search("try again in (600|[1-5][0-9]{2}) s", error.remedy)
    assert [found.name for found in service.place.records()] == [record.name]
    assert service.backup().problems == [], "the first backup must have released the location"


def test_lease_of_a_killed_backup_expires_by_the_clock_of_the_location(service: Service) -> None:
    service.place.lease(renew_seconds=1e6).__enter__()  # the context is never exited
    path = service.folder / "backups" / "lease.json"
    with pytest.raises(Conflict):
        service.backup()

    expired_at = time.time() - BACKUP_LEASE_SECONDS - 1
    os.utime(path, (expired_at, expired_at))

    assert service.backup().problems == []
    assert not path.exists()


def test_backup_that_lost_its_lease_neither_finishes_nor_deletes(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = service.backup()
    put = service.place.put

    def put_after_another_took_over(*given: Any) -> Any:
        (service.folder / "backups" / "lease.json").write_text('{"token": "of another", "host": "h", "pid": 1}')
        return put(*given)

    monkeypatch.setattr(service.place, "put", put_after_another_took_over)

    with pytest.raises(Conflict) as refused:
        service.backup(keep=1)

    assert refused.value.code == "backup_running"
    assert "Another backup (process 1 on host h) took over" in refused.value.message
    assert "incomplete" in refused.value.message
    assert refused.value.remedy.endswith("then create a new backup.")
    assert [record.name for record in service.place.records()] == [first.name]
    assert (service.folder / "backups" / "lease.json").exists(), "the lease of the other backup must remain"


def test_backup_that_lost_its_lease_once_complete_keeps_the_old_ones(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.backup()
    finish = service.place.finish

    def finish_before_another_takes_over(record: BackupRecord) -> None:
        finish(record)
        (service.folder / "backups" / "lease.json").write_text("unreadable")

    monkeypatch.setattr(service.place, "finish", finish_before_another_takes_over)

    with pytest.raises(Conflict) as refused:
        service.backup(keep=1)

    newest = service.place.records()[-1].name
    assert refused.value.message.startswith(f"Another backup took over {service.place.url}")
    assert refused.value.message.endswith(f"Backup {newest} is complete, but no old backups were deleted.")
    assert refused.value.remedy.endswith("then create a backup with --keep, which deletes the old ones.")
    assert len(service.place.records()) == 2


def test_lease_is_renewed_while_it_is_held(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    renewed = Event()
    lease = service.place.lease(renew_seconds=0.001)
    path = service.folder / "backups" / "lease.json"
    with lease:
        os.utime(path, (1.0, 1.0))
        put = lease.objects.put
        monkeypatch.setattr(lease.objects, "put", lambda *given: (put(*given), renewed.set()))
        assert renewed.wait(30)

        assert path.stat().st_mtime > 1.0


def test_backup_without_its_record_does_not_exist(service: Service, elsewhere: Settings) -> None:
    record = service.backup()
    with pytest.raises(NotFound, match=f"no backup named 'other' at {service.place.url}") as unknown:
        restore(elsewhere, service.place, name="other")
    (service.folder / "backups" / "backups" / record.name / "backup.json").unlink()

    with pytest.raises(NotFound) as refused:
        restore(elsewhere, service.place)

    assert unknown.value.remedy == f"Omit --backup to restore the only backup there: {record.name}."
    assert refused.value.message == f"There are no backups at {service.place.url}."
    assert f"`python -m api backup {service.place.url}`" in refused.value.remedy


def test_unknown_backup_names_the_newest_backups(
    service: Service, elsewhere: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = service.backup(), service.backup()
    with pytest.raises(NotFound) as few:
        restore(elsewhere, service.place, name="other")
    monkeypatch.setattr(location, "MAX_NAMED", 1)
    with pytest.raises(NotFound) as many:
        restore(elsewhere, service.place, name="other")

    names = [record.name for record in service.place.records()]
    assert {first.name, second.name} == set(names)
    assert few.value.remedy.endswith(f"or choose one of: {names[1]}, {names[0]}.")
    assert many.value.remedy.endswith(f"or choose one of the 2 backups there. The newest are {names[1]}.")


def test_backup_location_that_is_a_file_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "backups"
    path.write_text("")

    for is_new in (True, False):
        with pytest.raises(NotFound, match="is not a folder"):
            open_place(str(path), is_new=is_new)


def test_changed_backup_is_rejected_and_nothing_is_created(service: Service, elsewhere: Settings) -> None:
    record = service.backup()
    dumped = service.folder / "backups" / "backups" / record.name / "database"
    dumped.write_bytes(dumped.read_bytes() + b"x")

    with pytest.raises(Exception, match="does not match its digest"):
        restore(elsewhere, service.place)

    database_dump.check_empty(elsewhere.resolved_database_url())


def test_restore_never_overwrites_existing_data(service: Service, elsewhere: Settings) -> None:
    service.backup()
    restore(elsewhere, service.place)

    with pytest.raises(Conflict, match="already"):
        restore(elsewhere, service.place)


def test_backup_of_a_newer_or_unreleased_revision_or_of_another_format_is_rejected(
    service: Service, elsewhere: Settings
) -> None:
    service.backup()
    (path,) = (service.folder / "backups" / "backups").glob("*/backup.json")
    text = path.read_text()

    path.write_text(json.dumps({**json.loads(text), "revision": LATER}))
    with pytest.raises(InvalidRequest, match=f"newer version.* {LATER}.*only up to {revisions.newest()}") as refused:
        restore(elsewhere, service.place)
    assert refused.value.code == "backup_incompatible"
    path.write_text(json.dumps({**json.loads(text), "revision": UNRELEASED}))
    with pytest.raises(InvalidRequest, match="pre-release build") as refused:
        restore(elsewhere, service.place)
    assert refused.value.code == "backup_incompatible"
    path.write_text(text.replace('"format": 3', '"format": 4'))
    with pytest.raises(InvalidRequest, match=f"Backup {path.parent.name} has format 4.* only format 3"):
        restore(elsewhere, service.place)


def test_backup_folder_is_private(service: Service) -> None:
    service.backup()

    assert stat.S_IMODE((service.folder / "backups").stat().st_mode) == 0o700


def test_missing_backup_location_is_reported_and_not_created(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        open_place(str(tmp_path / "none"))

    assert not (tmp_path / "none").exists()


def test_bucket_works_as_a_backup_location(
    service: Service, elsewhere: Settings, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.services.s3 import new_bucket

    bucket = new_bucket(s3_endpoint)
    for name, value in bucket.environment().items():
        monkeypatch.setenv(name, value)
    service.finish(service.running(), "adapter")
    place = BackupPlace(f"s3://{bucket.name}/lorry")

    create(service.world.db, service.store, place, work_dir=service.folder / "work", peppers=PEPPER.all())

    assert restore(elsewhere, open_place(f"s3://{bucket.name}/lorry/")).checked.problems == []


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_snapshot_transaction_has_no_idle_timeout(service: Service) -> None:
    recorded: list[str] = []
    event.listen(service.world.db.engine, "before_cursor_execute", lambda *given: recorded.append(given[2]))

    service.backup()

    copied = next(place for place, text in enumerate(recorded) if "FROM organizations" in text)
    assert "set local idle_in_transaction_session_timeout = 0" in recorded[:copied]
