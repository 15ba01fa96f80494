"""Making a backup while the service works: files, then the database, then the files that came meanwhile."""

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
from catalog.settings import Settings
from catalog.storage.manifest import DamagedArtifact, Manifest
from catalog.storage.store import ArtifactStore, blob_key, manifest_key, open_store
from catalog.tables.audit import AuditEvent
from catalog.tables.storage import Adapter, Artifact, File
from catalog.tables.table import Json


@dataclass(frozen=True, kw_only=True, slots=True)
class Backup:
    """A backup, and what was copied for it."""

    record: BackupRecord
    num_copied: int
    """Objects that no earlier backup at this place had."""
    forgotten: list[str]
    """Names of the backups that were deleted for it."""


def create(
    db: Database, store: ArtifactStore, place: BackupPlace, *, work_dir: Path, keep: int | None = None
) -> Backup:
    """Copy the database and all that it names. keep: so many backups stay at the place, this one among them.

    An object that the store does not have, or whose content has changed, is reported in the record's `problems`; all
    others are copied. Raises Conflict where another backup to the place is running, InvalidRequest where the database
    can't be dumped, Unavailable and OutOfSpace.
    """
    with place.lease() as lease:
        made = _copy(db, store, place, work_dir=work_dir)
        lease.check()
        place.finish(made.record)
        if keep is None:
            return made
        lease.check()
        return replace(made, forgotten=place.forget_all_but(keep))


def _copy(db: Database, store: ArtifactStore, place: BackupPlace, *, work_dir: Path) -> Backup:
    """All of a backup except its record, without which it is none."""
    there = references.stored(place.store)
    num_before = len(there)
    with db.read() as session:
        keys = references.named(session)
    with full_disk_named():
        work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="backup-", dir=work_dir) as folder:
        copier = references.Copier(source=store.objects, target=place.store, there=there, spool_dir=Path(folder))
        copier.copy(keys)  # most of it; what can't be copied was let go since, or is told the second time
        dumped = Path(folder) / "database"
        with full_disk_named():
            snapshot = database_dump.take(db, dumped)
        problems = copier.copy(snapshot.keys)
        name = f"{datetime.fromtimestamp(snapshot.taken_at, UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
        told = place.put(name, dumped, snapshot.keys)
    record = BackupRecord(
        name=name,
        taken_at=snapshot.taken_at,
        database=database_dump.kind_of(db.url),
        revision=snapshot.revision,
        row_counts=snapshot.row_counts,
        audit_link=snapshot.audit_link,
        audit_digest=snapshot.audit_digest,
        problems=[*problems.values()],
        **told,
    )
    return Backup(record=record, num_copied=len(there) - num_before, forgotten=[])


@dataclass(frozen=True, kw_only=True, slots=True)
class BackupCheck:
    """What was read and computed anew."""

    num_artifacts: int
    num_objects: int
    num_audit_events: int
    problems: list[str]


def verify(db: Database, store: ArtifactStore, *, peppers: Sequence[bytes]) -> BackupCheck:
    """Read every object that the record names, and verify the audit chain and its anchors. Raises Unavailable.

    peppers: where none is known, of the chain only the order is verified.
    Where the database is damaged, that alone is reported: what it says of anything else can't be trusted.
    """
    if damage := integrity.damage(db):
        return BackupCheck(num_artifacts=0, num_objects=0, num_audit_events=0, problems=damage)
    with db.read() as session:
        keys = references.named(session)
        artifacts = list(session.scalars(select(Artifact)))
    damaged = references.damaged(keys, store.objects)
    with db.read() as session:
        problems = integrity.orphans(db) + _of_artifacts(session, artifacts, damaged) + _of_files(session, damaged)
        num_events, misfits = _of_chain(db, store, peppers)
    told = {sentence for sentence in damaged.values() if not any(sentence in problem for problem in problems)}
    return BackupCheck(
        num_artifacts=len(artifacts),
        num_objects=len(keys),
        num_audit_events=num_events,
        problems=[*problems, *sorted(told), *misfits],
    )


def _of_artifacts(session: Session, artifacts: list[Artifact], damaged: Mapping[str, str]) -> list[str]:
    names = {row.artifact: row.name for row in session.execute(select(Adapter.artifact, Adapter.name))}
    problems: list[str] = []
    for row in artifacts:
        name = names.get(row.digest) or f"The artifact {row.digest} ({row.kind})"
        keys = [*(blob_key(file["digest"]) for file in row.files), manifest_key(row.digest)]
        problems += [f"{name}: {damaged[key]}" for key in keys if key in damaged]
        if not _is_itself(row):
            problems.append(f"{name}: its row names other files than its manifest.")
    return problems


def _is_itself(row: Artifact) -> bool:
    try:
        return Manifest.from_rows(row.kind, row.files).digest == row.digest
    except DamagedArtifact:
        return False


def _of_files(session: Session, damaged: Mapping[str, str]) -> list[str]:
    there = session.execute(select(File.id, File.digest).where(File.deleted_at.is_(None)))
    return [f"{row.id}: {damaged[blob_key(row.digest)]}" for row in there if blob_key(row.digest) in damaged]


def _of_chain(db: Database, store: ArtifactStore, peppers: Sequence[bytes]) -> tuple[int, list[str]]:
    """How many sealed events there are, and what doesn't fit."""
    num_events = 0
    while True:
        found = audit_anchors.verify(db, store.objects, peppers=peppers, after=num_events)
        num_events += found.num_events
        if found.misfit is not None:
            of = f" ({found.misfit.id})" if found.misfit.id else ""
            return num_events, [f"The audit chain does not fit at {found.misfit.link}{of}: {found.misfit.fault}."]
        if not found.has_more:
            return num_events, []


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """A backup that is a service's database and store again."""

    record: BackupRecord
    num_copied: int
    """Objects that the store did not have."""
    superseded_anchors: list[str]
    """Objects of anchors of the audit chain that came after the backup: their events are lost."""
    checked: BackupCheck
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
        restored_at = _record_restore(db, record, superseded)
        audit_anchors.supersede(store.objects, superseded, at=restored_at)
        checked = verify(db, store, peppers=peppers)
    finally:
        db.close()
    names = [anchor.key for anchor in superseded]
    return Restored(record=record, num_copied=len(there) - num_before, superseded_anchors=names, checked=checked)


def _check_same(db: Database, record: BackupRecord) -> None:
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


def _differences_of_chain(db: Database, record: BackupRecord) -> list[str]:
    if record.audit_link == 0:  # nothing was sealed, or the version of the backup had no audit log
        return []
    with db.read() as session:
        digest = session.scalar(select(AuditEvent.digest).where(AuditEvent.link == record.audit_link))
    if digest == record.audit_digest:
        return []
    return [f"The audit chain has another event at {record.audit_link} than the backup recorded."]


def _record_restore(db: Database, record: BackupRecord, superseded: Sequence[Superseded]) -> float:
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


def _check_fits(record: BackupRecord, url: str) -> None:
    if database_dump.kind_of(url) != record.database:
        raise Conflict(
            f"The backup {record.name} is of a {record.database} database, and LORRY_DATABASE_URL names another kind.",
            code="backup_of_another_database",
            remedy=f"Name an empty {record.database} database.",
        )
    if revisions.is_unreleased(record.revision):
        raise InvalidRequest(
            f"The tables of the backup {record.name} are of a build before the first release ({record.revision}): they "
            "cannot be upgraded.",
            code="backup_not_upgradable",
            remedy="Restore it by the build that made it. For this version, make a new database: python -m api "
            "bootstrap.",
        )
    if record.revision not in revisions.known():
        raise InvalidRequest(
            f"The tables of the backup {record.name} are of a newer version ({record.revision}) than this one.",
            code="backup_of_a_newer_version",
            remedy="Restore it by that version of Lorry, or by a later one.",
        )
