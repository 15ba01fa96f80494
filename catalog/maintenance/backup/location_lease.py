"""Ensures that only one backup at a time writes to a location, by a lease object.

A backup creates the object only if none exists, and renews it while it runs. A killed backup leaves the object behind:
it expires BACKUP_LEASE_SECONDS after its last renewal by the location's clock, and the next backup takes over. Two
backups that take over at the same moment may both believe that they hold the lease. `check` detects that, before
anything is finished or deleted.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import socket
import threading
from contextlib import suppress
from typing import Any, cast

from catalog.errors import Conflict, OutOfSpace, Unavailable
from catalog.storage.object_storage import NoSuchObject, Objects

KEY = "lease.json"
BACKUP_LEASE_SECONDS = 600.0
RENEW_SECONDS = 60.0
log = logging.getLogger("lorry.catalog")


class LocationLease:
    """Context manager of the lease. Raises Conflict if another backup is running, OutOfSpace, Unavailable."""

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
        if not self.objects.create(KEY, self._content):
            self._refuse_if_held()
            with suppress(NoSuchObject):
                self.objects.delete(KEY)
            if not self.objects.create(KEY, self._content):
                raise self._running(expires_in=BACKUP_LEASE_SECONDS)
        self._renewing.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._renewing.join()
        with suppress(NoSuchObject, Unavailable):  # if the deletion fails, the lease expires
            if self._is_own():
                self.objects.delete(KEY)

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
            age = self.objects.now() - self.objects.head(KEY).written_at
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
                    self.objects.put(KEY, self._content)
            except (OutOfSpace, Unavailable) as error:
                log.warning("backup lease not renewed code=%s", error.code)

    def _is_own(self) -> bool:
        try:
            return self._read() == self._content
        except NoSuchObject:
            return False

    def _read(self) -> bytes:
        return b"".join(self.objects.read(KEY))
