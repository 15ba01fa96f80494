"""Writes audit events for downloads of data files, adapters and the audit log itself.

Repeated downloads of one object by one key from one address are recorded once per REPEAT_SECONDS, so that a polling
client does not fill the audit log. Each API server process tracks this separately.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

from catalog.audit import log as audit
from catalog.caller import Caller
from catalog.db.database import Database, read_clock
from catalog.errors import OutOfSpace, Unavailable
from catalog.tables.table import Json

REPEAT_SECONDS = 600.0
MAX_REMEMBERED = 10_000
"""Maximum number of remembered downloads. Beyond it, the oldest is forgotten, and its next repetition is recorded."""
ReadType = Literal["file.downloaded", "adapter.downloaded", "audit.exported"]
log = logging.getLogger("lorry.audit")


class ReadAudit:
    """Records downloads in the audit log. Thread-safe; one instance per API server process."""

    def __init__(self, db: Database, *, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: monotonic seconds."""
        self._db = db
        self._clock = clock
        self._recorded_at: OrderedDict[tuple[str, ...], float] = OrderedDict()
        self._lock = threading.Lock()

    def record(
        self,
        type: ReadType,  # noqa: A002  (the API's word)
        *,
        caller: Caller,
        object_id: str | None = None,
        details: Json | None = None,
    ) -> None:
        """Add one event for the caller's project, unless the same download was recorded recently.

        If the database can't be written, the download continues, and a logged warning replaces the event.
        """
        download = (type, caller.api_key_id, object_id or "", audit.client_address() or "")
        if not self._is_new(download):
            return
        try:
            with self._db.write() as session:
                audit.note(
                    session,
                    type,
                    now=read_clock(session),
                    object_id=object_id,
                    project_id=caller.project_id,
                    details=details,
                )
        except (OutOfSpace, Unavailable) as error:
            with self._lock:
                self._recorded_at.pop(download, None)
            log.warning(
                "not in the audit log: %s key=%s object=%s address=%s code=%s", *download[:3], download[3], error.code
            )

    def _is_new(self, download: tuple[str, ...]) -> bool:
        with self._lock:
            now = self._clock()
            before = self._recorded_at.get(download)
            if before is not None and now - before < REPEAT_SECONDS:
                return False
            self._recorded_at[download] = now
            self._recorded_at.move_to_end(download)
            if len(self._recorded_at) > MAX_REMEMBERED:
                self._recorded_at.popitem(last=False)
            return True
