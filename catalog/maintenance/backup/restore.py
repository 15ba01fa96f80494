"""Putting a backup back: files first, then the database, in which they are visible. Never over what is there."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import select

from catalog import pepper
from catalog.audit import log
from catalog.db.database import Database, alembic_config, read_clock
from catalog.disk import full_disk_named
from catalog.errors import Conflict, InvalidRequest
from catalog.maintenance import audit_anchors
from catalog.maintenance.audit_anchors import Superseded
from catalog.maintenance.backup import database_dump, integrity, references
from catalog.maintenance.backup.location import BackupPlace, Record
from catalog.maintenance.backup.verify import Checked, check
from catalog.settings import Settings
from catalog.storage.store import open_store
from catalog.tables import AuditEvent, Json


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """A backup that is a service's database and store again."""

    record: Record
    num_copied: int
    """Objects that the store did not have."""
    superseded_anchors: list[str]
    """Objects of anchors of the audit chain that came after the backup: their events are lost."""
    checked: Checked
    """Also what could not be copied, as far as the record names it."""


def restore(settings: Settings, place: BackupPlace, *, name: str | None = None) -> Restored:
    """Into the database and the store that the settings name; the database must have no tables. Then check all of it.

    name: the newest backup where it is None. What this version has for newer tables is migrated. Raises NotFound,
    Conflict, InvalidRequest, DamagedArtifact, Unavailable, OutOfSpace: then the database is as it was, except after
    the Conflict `restored_database_differs`.
    """
    record = place.find(name)
    url = settings.resolved_database_url()
    _check_fits(record, url)
    database_dump.check_empty(url)
    store = open_store(settings)
    there = references.stored(store.objects)
    num_before = len(there)
    with full_disk_named():
        settings.work_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="restore-", dir=settings.work_dir()) as folder:
        dumped = Path(folder) / "database"
        with full_disk_named():
            place.fetch_dump(record, dumped)
        references.Copier(source=place.store, target=store.objects, there=there, spool_dir=Path(folder)).copy(
            place.keys(record)
        )
        with full_disk_named():
            database_dump.put_back(dumped, url)
    db = Database(url)
    try:
        _check_same(db, record)
        db.migrate()
        peppers = pepper.known(settings)
        superseded = audit_anchors.contradicting(db, store.objects, peppers=peppers, since=record.taken_at)
        restored_at = _note(db, record, superseded)
        audit_anchors.supersede(store.objects, superseded, at=restored_at)
        checked = check(db, store, peppers=peppers)
    finally:
        db.close()
    names = [anchor.key for anchor in superseded]
    return Restored(record=record, num_copied=len(there) - num_before, superseded_anchors=names, checked=checked)


def _check_same(db: Database, record: Record) -> None:
    """The database is sound, and has the revision, the rows and the end of the audit chain that the backup recorded.

    Call it before any migration: a migration may change each of them.
    """
    problems = integrity.damage(db) or [
        *integrity.differences(db, recorded_revision=record.revision, recorded_counts=record.row_counts),
        *_differences_of_chain(db, record),
    ]
    if problems:
        raise Conflict(
            f"The restored database is not the one in the backup {record.name}. {' '.join(problems)}",
            code="restored_database_differs",
            remedy="Do not start the service on it. Drop the database, or move its file with the -wal and -shm files "
            "away. Then restore this backup again, or an earlier one with --backup NAME.",
        )


def _differences_of_chain(db: Database, record: Record) -> list[str]:
    if record.audit_link == 0:  # nothing was sealed, or the version of the backup had no audit log
        return []
    with db.read() as session:
        digest = session.scalar(select(AuditEvent.digest).where(AuditEvent.link == record.audit_link))
    if digest == record.audit_digest:
        return []
    return [f"The audit chain has another event at {record.audit_link} than the backup recorded."]


def _note(db: Database, record: Record, superseded: Sequence[Superseded]) -> float:
    """Readers of the log learn that what came after the backup is not in it. Returns the time, in seconds since 1970.

    It precedes the move of the anchors: so none was moved without an event that names it.
    """
    with db.write() as session:
        now = read_clock(session)
        details: Json = {"taken_at": record.taken_at}
        if superseded:
            details["superseded_anchors"] = [asdict(anchor) for anchor in superseded]
        log.note(
            session,
            "service.restored",
            now=now,
            object_id=record.name,
            project_id=None,
            details=details,
        )
    return now


def _check_fits(record: Record, url: str) -> None:
    if database_dump.kind_of(url) != record.database:
        raise Conflict(
            f"The backup {record.name} is of a {record.database} database, and LORRY_DATABASE_URL names another kind.",
            code="backup_of_another_database",
            remedy=f"Name an empty {record.database} database.",
        )
    try:
        ScriptDirectory.from_config(alembic_config(url)).get_revision(record.revision)
    except CommandError as error:
        raise InvalidRequest(
            f"The tables of the backup {record.name} are of a newer version ({record.revision}) than this one.",
            code="backup_of_a_newer_version",
            remedy="Restore it by that version of Lorry, or by a later one.",
        ) from error
