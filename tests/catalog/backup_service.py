"""A test service with an artifact store and a backup folder, for tests of backup and restore."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from catalog.db.database import Database
from catalog.maintenance.backup.commands import create
from catalog.maintenance.backup.location import BackupRecord, open_place
from catalog.queue import claiming
from catalog.registry import adapters
from catalog.settings import Settings
from catalog.storage.object_storage import Objects
from catalog.storage.store import GRACE_SECONDS, ArtifactStore
from catalog.tables.table import Table
from tests.catalog.world import PEPPER, World, manifest, sha


class Service:
    """A world whose artifacts are stored as workers store them: first the files, then the database row."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.store = ArtifactStore(Objects((folder / "store").as_uri()))
        self.place = open_place(str(folder / "backups"), is_new=True)
        self.put(world.file_id)
        world.worker()

    def put(self, *texts: str) -> None:
        for text in texts:
            self.store.put_bytes(text.encode())

    def put_artifact(self, text: str, kind: str = "adapter") -> None:
        self.put(text)
        self.store.put_manifest(manifest(text, kind=kind))

    def running(self) -> claiming.Claim:
        self.put_artifact(f"tokens {sha(self.world.file_id)}", kind="tokens")
        return self.world.running()

    def finish(self, claim: claiming.Claim, content: str) -> str:
        """Complete the job and return the name of its adapter."""
        self.put(f"curves of {claim.claim_id}")
        self.put_artifact(content)
        return self.world.complete(claim.claim_id, content).name

    def delete(self, name: str) -> None:
        adapters.delete(self.world.db, project_id=self.world.caller.project_id, name=name)

    def age(self) -> None:
        """Age all stored files beyond the grace period, so that cleanup may delete unreferenced ones."""
        later = self.store.clock() - 2 * GRACE_SECONDS
        for path in (self.folder / "store").rglob("*"):
            if path.is_file():
                os.utime(path, (later, later))

    def backup(self, store: ArtifactStore | None = None, **given: Any) -> BackupRecord:
        work_dir = self.folder / "work"
        given = {"peppers": PEPPER.all(), **given}
        return create(self.world.db, store or self.store, self.place, work_dir=work_dir, **given).record


def opened(settings: Settings) -> Database:
    return Database(settings.resolved_database_url())


def content(db: Database) -> dict[str, list[Any]]:
    """Return all rows by table. JSON is returned as it is stored."""
    found: dict[str, list[Any]] = {}
    with db.engine.connect() as connection:
        for table in Table.metadata.sorted_tables:
            columns = [sa.cast(each, sa.Text) if isinstance(each.type, sa.JSON) else each for each in table.c]
            found[table.name] = sorted((tuple(row) for row in connection.execute(sa.select(*columns))), key=repr)
    return found


def blobs(objects: Objects) -> dict[str, bytes]:
    return {entry.key: b"".join(objects.read(entry.key)) for entry in objects.list_all("")}


def without_restores(found: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Leave out the audit event that each restore writes."""
    events = [row for row in found["audit_events"] if "service.restored" not in row]
    return {**found, "audit_events": events}
