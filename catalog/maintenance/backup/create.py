"""Making a backup while the service works: files, then the database, then the files that came meanwhile."""

from __future__ import annotations

import secrets
import tempfile
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from catalog.db.database import Database
from catalog.disk import full_disk_named
from catalog.maintenance.backup import database_dump, references
from catalog.maintenance.backup.location import BackupPlace, Record
from catalog.storage.store import ArtifactStore


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A backup, and what was copied for it."""

    record: Record
    num_copied: int
    """Objects that no earlier backup at this place had."""
    forgotten: list[str]
    """Names of the backups that were deleted for it."""


def make(db: Database, store: ArtifactStore, place: BackupPlace, *, work_dir: Path, keep: int | None = None) -> Made:
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


def _copy(db: Database, store: ArtifactStore, place: BackupPlace, *, work_dir: Path) -> Made:
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
    record = Record(
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
    return Made(record=record, num_copied=len(there) - num_before, forgotten=[])
