"""Creates, verifies and restores backups while the service runs.

A backup copies objects, then dumps the database, then copies the objects that were stored in the meantime.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from catalog import pepper
from catalog.audit import log
from catalog.db import revisions
from catalog.db.database import Database, read_clock
from catalog.disk import full_disk_named
from catalog.errors import Conflict, InvalidRequest
from catalog.maintenance import audit_anchors
from catalog.maintenance.audit_anchors import Superseded
from catalog.maintenance.backup import database_dump, integrity, references
from catalog.maintenance.backup.location import BackupPlace, BackupRecord
from catalog.registry import base_models
from catalog.settings import Settings
from catalog.storage.manifest import DamagedArtifact, Manifest
from catalog.storage.object_storage import create_missing_bucket
from catalog.storage.store import ArtifactStore, blob_key, manifest_key, open_store
from catalog.tables.storage import Adapter, Artifact, File
from catalog.tables.table import Json
from catalog.tables.tenancy import AuditEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class Backup:
    """The result of `create`."""

    record: BackupRecord
    num_copied: int
    """Number of objects that no earlier backup at this location had."""
    forgotten: list[str]
    """Names of the old backups that were deleted."""


def create(
    db: Database,
    store: ArtifactStore,
    place: BackupPlace,
    *,
    work_dir: Path,
    peppers: Sequence[bytes],
    keep: int | None = None,
) -> Backup:
    """Back up the database and all objects that it refers to.

    peppers: those of this machine, the current one first. If there is one, a restore with another pepper is refused;
    otherwise the restore's check of the audit chain reports it.
    keep: the number of backups to keep at the location, including this one; older ones are deleted.

    Objects that are missing or whose content has changed are reported in the record's `problems`; all others are
    copied. Raises Conflict if another backup to the location is running, or if the database is damaged. Raises
    Unavailable and OutOfSpace.
    """
    with place.lease() as lease:
        made = _copy(db, store, place, work_dir=work_dir, peppers=peppers)
        lease.check("This backup is incomplete, and it deleted nothing.", then="create a new backup")
        place.finish(made.record)
        if keep is None:
            return made
        outcome = f"Backup {made.record.name} is complete, but no old backups were deleted."
        lease.check(outcome, then="create a backup with --keep, which deletes the old ones")
        return replace(made, forgotten=place.forget_all_but(keep))


def _copy(
    db: Database, store: ArtifactStore, place: BackupPlace, *, work_dir: Path, peppers: Sequence[bytes]
) -> Backup:
    """Store all parts of a backup except its record, without which it does not count as a backup."""
    stored_keys = references.stored(place.store)
    num_before = len(stored_keys)
    with integrity.damage_refused(db.engine.url), db.read() as session:
        keys = references.named(session)
    with full_disk_named():
        work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="backup-", dir=work_dir) as folder:
        copier = references.Copier(
            source=store.objects, target=place.store, existing=stored_keys, spool_dir=Path(folder)
        )
        copier.copy(keys)  # most objects; an object that fails was deleted since, or is reported by the second copy
        dumped = Path(folder) / "database"
        with full_disk_named():
            snapshot = database_dump.take(db, dumped)
        problems = copier.copy(snapshot.keys)
        name = f"{datetime.fromtimestamp(snapshot.taken_at, UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
        location_fields = place.put(name, dumped, snapshot.keys)
    record = BackupRecord(
        name=name,
        taken_at=snapshot.taken_at,
        revision=snapshot.revision,
        pepper_mark=pepper.backup_mark(peppers[0], name) if peppers else "",
        row_counts=snapshot.row_counts,
        audit_link=snapshot.audit_link,
        audit_digest=snapshot.audit_digest,
        problems=[*problems.values()],
        **location_fields,
    )
    return Backup(record=record, num_copied=len(stored_keys) - num_before, forgotten=[])


@dataclass(frozen=True, kw_only=True, slots=True)
class BackupCheck:
    """The result of `verify`."""

    num_artifacts: int
    num_objects: int
    num_audit_events: int
    problems: list[str]


def verify(db: Database, store: ArtifactStore, *, peppers: Sequence[bytes]) -> BackupCheck:
    """Read every object that the database refers to, and verify the audit chain and its anchors. Raises Unavailable.

    peppers: without any, only the order of the chain is verified. If the database is damaged, only the damage is
    reported, because its other content can't be trusted.
    """
    if damage := integrity.damage(db):
        return BackupCheck(num_artifacts=0, num_objects=0, num_audit_events=0, problems=damage)
    with db.read() as session:
        keys = references.named(session)
        artifacts = list(session.scalars(select(Artifact)))
    damaged = references.damaged(keys, store.objects)
    with db.read() as session:
        in_use = set(references.named(session)) if damaged else set[str]()  # others were deleted in the meantime
        damaged = {key: sentence for key, sentence in damaged.items() if key in in_use}
        problems = integrity.orphans(db) + _of_artifacts(session, artifacts, damaged) + _of_files(session, damaged)
        num_events, misfits = _of_chain(db, store, peppers)
    unattributed = {sentence for sentence in damaged.values() if not any(sentence in problem for problem in problems)}
    return BackupCheck(
        num_artifacts=len(artifacts),
        num_objects=len(keys),
        num_audit_events=num_events,
        problems=[*problems, *sorted(unattributed), *misfits],
    )


def _of_artifacts(session: Session, artifacts: list[Artifact], damaged: Mapping[str, str]) -> list[str]:
    names = {row.artifact: row.name for row in session.execute(select(Adapter.artifact, Adapter.name))}
    problems: list[str] = []
    for row in artifacts:
        name = names.get(row.digest) or f"Artifact {row.digest} ({row.kind})"
        keys = [*(blob_key(file["digest"]) for file in row.files), manifest_key(row.digest)]
        problems += [f"{name}: {damaged[key]}" for key in keys if key in damaged]
        if not _is_itself(row):
            problems.append(f"{name}: its database row and its manifest list different files.")
    return problems


def _is_itself(row: Artifact) -> bool:
    try:
        return Manifest.from_rows(row.kind, row.files).digest == row.digest
    except DamagedArtifact:
        return False


def _of_files(session: Session, damaged: Mapping[str, str]) -> list[str]:
    rows = session.execute(select(File.id, File.digest).where(File.deleted_at.is_(None)))
    return [f"{row.id}: {damaged[blob_key(row.digest)]}" for row in rows if blob_key(row.digest) in damaged]


def _of_chain(db: Database, store: ArtifactStore, peppers: Sequence[bytes]) -> tuple[int, list[str]]:
    """Return the number of sealed events up to the first fault, and that fault as a sentence."""
    num_events = 0
    while True:
        found = audit_anchors.verify(db, store.objects, peppers=peppers, after=num_events)
        num_events += found.num_events
        if found.misfit is not None:
            of = f" ({found.misfit.id})" if found.misfit.id else ""
            return num_events, [f"The audit chain is broken at link {found.misfit.link}{of}: {found.misfit.fault}."]
        if not found.has_more:
            return num_events, []


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """The result of `restore`."""

    record: BackupRecord
    num_copied: int
    """Number of objects that the store did not have."""
    superseded_anchors: list[str]
    """Objects of the audit anchors that were written after the backup: their events are lost."""
    local_sources: dict[str, str]
    """Paths of the base models that were imported from a folder or a file, by name."""
    checked: BackupCheck
    """Also reports objects that could not be copied, if the database refers to them."""


def restore(settings: Settings, place: BackupPlace, *, name: str | None = None) -> Restored:
    """Restore a backup into the configured database and store, and verify the result.

    A backup of SQLite or PostgreSQL fits either. The configured database must have no tables. It is migrated to the
    schema of this version. name: None restores the newest backup. Raises NotFound, Conflict, InvalidRequest,
    DamagedArtifact, Unavailable and OutOfSpace. After an error the database is unchanged, except after the Conflict
    `restored_database_differs`.
    """
    record = place.find(name)
    url = settings.resolved_database_url()
    peppers = pepper.known(settings)
    _check_fits(record, peppers)
    database_dump.check_empty(url)
    create_missing_bucket(settings.resolved_store_url())
    store = open_store(settings)
    stored_keys = references.stored(store.objects)
    num_before = len(stored_keys)
    with full_disk_named():
        settings.work_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="restore-", dir=settings.work_dir()) as folder:
        dumped = Path(folder) / "database"
        with full_disk_named():
            place.fetch_dump(record, dumped)
        references.Copier(source=place.store, target=store.objects, existing=stored_keys, spool_dir=Path(folder)).copy(
            place.keys(record)
        )
        with full_disk_named():
            database_dump.restore(dumped, url)
    db = Database(url)
    try:
        _check_same(db, record)
        db.migrate()
        superseded = audit_anchors.contradicting(db, store.objects, peppers=peppers, since=record.taken_at)
        restored_at = _record_restore(db, record, superseded)
        audit_anchors.supersede(store.objects, superseded, at=restored_at)
        checked = verify(db, store, peppers=peppers)
        bases = base_models.list_all(db)
    finally:
        db.close()
    return Restored(
        record=record,
        num_copied=len(stored_keys) - num_before,
        superseded_anchors=[anchor.key for anchor in superseded],
        local_sources={row.name: row.source for row in bases if row.kind != "hub"},
        checked=checked,
    )


def _check_same(db: Database, record: BackupRecord) -> None:
    """Check that the database is intact, and has the revision, row counts and audit chain head of the backup's record.

    Call it before any migration, which may change each of them. Raises Conflict.
    """
    problems = integrity.damage(db) or [
        *integrity.differences(db, recorded_revision=record.revision, recorded_counts=record.row_counts),
        *_differences_of_chain(db, record),
    ]
    if problems:
        name = db.engine.url.database or ""
        aside = f"Drop {name}, and create it again without tables."
        if db.is_sqlite:
            aside = f"Move {name}, with its -wal and -shm files, to another folder."
        raise Conflict(
            "restored_database_differs", name=name, record=record.name, problems=" ".join(problems), aside=aside
        )


def _differences_of_chain(db: Database, record: BackupRecord) -> list[str]:
    if record.audit_link == 0:  # no event was sealed, or the backup's version had no audit log
        return []
    with db.read() as session:
        digest = session.scalar(select(AuditEvent.digest).where(AuditEvent.link == record.audit_link))
    if digest == record.audit_digest:
        return []
    return [f"The event at link {record.audit_link} of the audit chain differs from the one that the backup recorded."]


def _record_restore(db: Database, record: BackupRecord, superseded: Sequence[Superseded]) -> float:
    """Write an audit event, which shows that events after the backup are lost. Returns its time in seconds since 1970.

    Call it before the anchors are moved, so that no anchor is moved without an event that names it.
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


def _check_fits(record: BackupRecord, peppers: Sequence[bytes]) -> None:
    marks = [pepper.backup_mark(each, record.name) for each in peppers]
    if marks and record.pepper_mark and record.pepper_mark not in marks:
        raise Conflict("backup_of_another_pepper", record=record.name)
    if revisions.is_unreleased(record.revision):
        raise InvalidRequest("backup_not_upgradable", record=record.name, revision=record.revision)
    newest = revisions.newest()
    if record.revision not in revisions.known():
        raise InvalidRequest("backup_of_a_newer_version", record=record.name, revision=record.revision, newest=newest)
