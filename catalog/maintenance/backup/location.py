"""The location of backups: a folder or a bucket. Its backups share one store, so each adds only new objects.

- `store/` contains objects by digest, like the service's own store.
- `backups/NAME/` contains `database` (the dump, a SQLite file in gzip format), `objects.txt` (the keys of its objects)
  and `backup.json` (the record), which is written last: a folder without it is not a backup.
- `lease.json` exists while a backup runs.
"""

from __future__ import annotations

import gzip
import json
import shlex
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from catalog.disk import full_disk_named
from catalog.errors import InvalidRequest, NotFound
from catalog.maintenance.backup.location_lease import RENEW_SECONDS, LocationLease
from catalog.maintenance.backup.references import Keys, stored
from catalog.storage.manifest import DamagedArtifact
from catalog.storage.object_storage import CHUNK_BYTES, NoSuchObject, Objects
from catalog.storage.store import verified

FORMAT = 3
MAX_NAMED = 10
"""Maximum number of backups that a message names."""
RECORD, DUMP, OBJECTS = "backup.json", "database", "objects.txt"


@dataclass(frozen=True, kw_only=True, slots=True)
class BackupRecord:
    """Metadata of one backup."""

    name: str
    taken_at: float
    """Seconds since 1970 by the database's clock."""
    revision: str
    pepper_mark: str
    """See `pepper.backup_mark`. Empty if the machine of the backup had no pepper."""
    dump_digest: str
    dump_bytes: int
    objects_digest: str
    num_objects: int
    audit_link: int
    audit_digest: str
    problems: list[str]
    """Sentences about objects that the database refers to and that could not be copied."""
    row_counts: dict[str, int]
    """Number of rows by table."""
    format: int = FORMAT


class BackupPlace:
    """A location of backups. Its methods raise Unavailable and OutOfSpace."""

    def __init__(self, url: str) -> None:
        self.url = url
        named = {"name": f"The backup location {url}", "checked": "that location"}
        self.store = Objects(f"{url}/store", **named)
        self._root = Objects(url, **named)
        self._backups = Objects(f"{url}/backups", **named)

    def lease(self, *, renew_seconds: float = RENEW_SECONDS) -> LocationLease:
        """Return a context manager that excludes other backups to this location."""
        return LocationLease(self._root, self.url, renew_seconds=renew_seconds)

    def records(self) -> list[BackupRecord]:
        """Return the records of complete backups, oldest first. Raises InvalidRequest if a newer version wrote one."""
        keys = [entry.key for entry in self._backups.list_all("") if entry.key.endswith(f"/{RECORD}")]
        found = (_record(b"".join(self._backups.read(key)), name=key.rpartition("/")[0]) for key in keys)
        return sorted(found, key=lambda record: record.taken_at)

    def find(self, name: str | None) -> BackupRecord:
        """Return the record with this name, or the newest one if `name` is None. Raises NotFound."""
        records = self.records()
        for record in reversed(records):
            if name in (None, record.name):
                return record
        if not records:
            url = shlex.quote(self.url)
            raise NotFound("no_backups_at_location", url=self.url, location=url)
        names = ", ".join(record.name for record in records[::-1][:MAX_NAMED])
        text = "backup_not_found" if len(records) > 1 else "only_other_backup_found"
        if len(records) > MAX_NAMED:
            raise NotFound("backup_not_found_among_many", name=str(name), url=self.url, num=len(records), names=names)
        raise NotFound(text, name=str(name), url=self.url, names=names)

    def put(self, name: str, dump: Path, keys: Keys) -> dict[str, Any]:
        """Store a dump and the keys of its objects. Returns their fields of the backup's record."""
        listed = "".join(f"{key}\n" for key in keys).encode()
        packed, digest, num_bytes = dump.with_name(f"{DUMP}.gz"), sha256(), 0
        with full_disk_named(), dump.open("rb") as content, gzip.open(packed, "wb", compresslevel=1) as out:
            shutil.copyfileobj(content, out, CHUNK_BYTES)
        for chunk in _chunks(packed):
            digest.update(chunk)
            num_bytes += len(chunk)
        self._backups.put(f"{name}/{DUMP}", _chunks(packed))
        self._backups.put(f"{name}/{OBJECTS}", listed)
        return {
            **{"dump_digest": digest.hexdigest(), "dump_bytes": num_bytes},
            **{"objects_digest": sha256(listed).hexdigest(), "num_objects": len(keys)},
        }

    def finish(self, record: BackupRecord) -> None:
        """Store the record, which completes the backup."""
        self._backups.put(f"{record.name}/{RECORD}", json.dumps(asdict(record), indent=1).encode())

    def keys(self, record: BackupRecord) -> Keys:
        """Return the keys of the backup's objects. Raises DamagedArtifact."""
        return b"".join(self._read(record, OBJECTS, record.objects_digest)).decode().splitlines()

    def fetch_dump(self, record: BackupRecord, into: Path) -> None:
        """Write the dump of the backup to the new file `into`. Raises DamagedArtifact."""
        packed = into.with_name(f"{into.name}.gz")
        with packed.open("xb") as stored:
            for chunk in self._read(record, DUMP, record.dump_digest):  # the digest is checked before it is unpacked
                stored.write(chunk)
        with gzip.open(packed) as content, into.open("xb") as out:
            shutil.copyfileobj(content, out, CHUNK_BYTES)
        packed.unlink()

    def forget_all_but(self, keep: int) -> list[str]:
        """Delete the backups except the newest `keep`, and their unshared objects. Returns the deleted backups' names.

        The caller holds the lease, because an object that a running backup counts as present must not be deleted.
        """
        records = self.records()
        old, kept = records[:-keep], records[-keep:]
        for record in old:
            for part in (RECORD, OBJECTS, DUMP):  # the record first, so that no incomplete backup is listed
                self._backups.delete(f"{record.name}/{part}")
        if old:
            live = {key for record in kept for key in self.keys(record)}
            for key in stored(self.store) - live:
                self.store.delete(key)
            self.store.delete_staged(older_than=self.store.now())
        return [record.name for record in old]

    def _read(self, record: BackupRecord, part: str, digest: str) -> Iterator[bytes]:
        try:
            read = self._backups.read(f"{record.name}/{part}")
        except NoSuchObject as error:
            raise DamagedArtifact("backup_part_missing", record=record.name, part=part, url=self.url) from error
        return verified(read, digest, if_changed="backup_part_changed", record=record.name, part=part, url=self.url)


def open_place(location: str, *, is_new: bool = False) -> BackupPlace:
    """Open the location at a folder's path, or at a URL of the form of LORRY_STORE_URL. Raises NotFound.

    is_new: creates a missing folder, with permissions for its owner only.
    """
    if "://" in location:
        return BackupPlace(location.rstrip("/"))
    folder = Path(location).expanduser().absolute()
    if is_new:
        with suppress(FileExistsError):  # a file, which is reported below
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not folder.is_dir():
        is_file = folder.exists()
        raise NotFound("backup_location_not_folder" if is_file else "backup_folder_missing", folder=str(folder))
    return BackupPlace(folder.as_uri())


def _record(content: bytes, *, name: str) -> BackupRecord:
    fields = cast("dict[str, Any]", json.loads(content))
    if (found := fields.get("format")) != FORMAT:
        raise InvalidRequest("backup_of_another_version", name=name, found=str(found), format=FORMAT)
    return BackupRecord(**fields)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
