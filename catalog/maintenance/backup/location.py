"""The location of backups: a folder or a bucket. Its backups share one store, so each adds only new objects.

- `store/` contains objects by digest, like the service's own store.
- `backups/NAME/` contains `database` (the dump, a SQLite file in gzip format), `objects.txt` (the keys of its objects)
  and `backup.json` (the record), which is written last: a folder without it is not a backup.
- `lease.json` exists while a backup runs.
"""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import secrets
import shlex
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from catalog.disk import full_disk_named
from catalog.errors import Conflict, InvalidRequest, NotFound, OutOfSpace, Unavailable
from catalog.maintenance.backup.references import Keys, stored
from catalog.storage.manifest import DamagedArtifact
from catalog.storage.object_storage import CHUNK_BYTES, NoSuchObject, Objects
from catalog.storage.store import verified

FORMAT = 3
MAX_NAMED = 10
"""Maximum number of backups that a message names."""
RECORD, DUMP, OBJECTS = "backup.json", "database", "objects.txt"
LEASE_KEY = "lease.json"
BACKUP_LEASE_SECONDS = 600.0
RENEW_SECONDS = 60.0
log = logging.getLogger("lorry.catalog")


class LocationLease:
    """Context manager of the lease object, with which only one backup at a time writes to a location.

    A backup creates the object only if none exists, and renews it while it runs. A killed backup leaves the object
    behind: it expires BACKUP_LEASE_SECONDS after its last renewal by the location's clock, and the next backup takes
    over. Two backups that take over at the same moment may both believe that they hold the lease. `check` detects that,
    before anything is finished or deleted. Raises Conflict if another backup is running, OutOfSpace, Unavailable.
    """

    def __init__(self, objects: Objects, location: str, *, renew_seconds: float = RENEW_SECONDS) -> None:
        """location: the name of the location in messages."""
        self.objects = objects
        self._location = location
        self._renew_seconds = renew_seconds
        holder = {"token": secrets.token_hex(16), "host": socket.gethostname(), "pid": os.getpid()}
        self._content = json.dumps(holder).encode()
        self._stop = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="backup lease", daemon=True)

    def __enter__(self) -> LocationLease:
        if not self.objects.create(LEASE_KEY, self._content):
            self._refuse_if_held()
            with suppress(NoSuchObject):
                self.objects.delete(LEASE_KEY)
            if not self.objects.create(LEASE_KEY, self._content):
                raise self._running(expires_in=BACKUP_LEASE_SECONDS)
        self._renewing.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._renewing.join()
        with suppress(NoSuchObject, Unavailable):  # if the deletion fails, the lease expires
            if self._is_own():
                self.objects.delete(LEASE_KEY)

    def check(self, outcome: str, *, then: str) -> None:
        """Raise Conflict if another backup has taken over.

        outcome: a sentence about what this backup has done. then: what the user does after the other backup.
        """
        if not self._is_own():
            holder = self._holder()
            raise Conflict(
                "backup_lease_lost",
                holder=holder,
                location=self._location,
                backup_lease_seconds=BACKUP_LEASE_SECONDS,
                outcome=outcome,
                then=then,
            )

    def _refuse_if_held(self) -> None:
        with suppress(NoSuchObject):  # the other backup has finished in the meantime
            age = self.objects.now() - self.objects.head(LEASE_KEY).written_at
            if age < BACKUP_LEASE_SECONDS:
                raise self._running(expires_in=BACKUP_LEASE_SECONDS - age)

    def _running(self, *, expires_in: float) -> Conflict:
        holder, seconds = self._holder(), math.ceil(expires_in)
        return Conflict("backup_running", location=self._location, holder=holder, seconds=seconds)

    def _holder(self) -> str:
        """Return the process that holds the lease, in parentheses; "" if it can't be read."""
        with suppress(NoSuchObject, ValueError, KeyError, TypeError):
            holder = cast("dict[str, Any]", json.loads(self._read()))
            return f" (process {holder['pid']} on host {holder['host']})"
        return ""

    def _renew(self) -> None:
        while not self._stop.wait(self._renew_seconds):
            try:
                if self._is_own():
                    self.objects.put(LEASE_KEY, self._content)
            except (OutOfSpace, Unavailable) as error:
                log.warning("backup lease not renewed code=%s", error.code)

    def _is_own(self) -> bool:
        try:
            return self._read() == self._content
        except NoSuchObject:
            return False

    def _read(self) -> bytes:
        return b"".join(self.objects.read(LEASE_KEY))


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
