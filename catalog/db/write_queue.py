"""Fair access to SQLite's write lock: SQLite has no queue, so a process that writes continuously starves others.

Threads of one process write in FIFO order. Processes alternate by means of a turnstile: a lock on a file next to the
database, held from the time at which a process is next until its transaction has begun. A process that has just
written must pass the turnstile again, so it can't overtake the process that waits in it. The kernel releases the lock
if a process dies.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from catalog.db.errors import busy, disk_full
from catalog.disk import is_full
from catalog.errors import OutOfSpace, Unavailable

POLL_SECONDS = 0.001
"""Interval between attempts to pass the turnstile, and of the process in it to begin its transaction."""
SUFFIX = "-turnstile"
"""Appended to the database's file name. The file is empty, and may be deleted while no process runs."""


class FairLock:
    """A lock that threads acquire in FIFO order."""

    def __init__(self) -> None:
        self._guard = Lock()
        self._waiting: deque[Lock] = deque()
        self._is_held = False

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def acquire(self, seconds: float) -> bool:
        """Acquire the lock. Returns False if it does not become free within `seconds`."""
        with self._guard:
            if not self._is_held:
                self._is_held = True
                return True
            own = Lock()
            own.acquire()
            self._waiting.append(own)
        try:
            if own.acquire(timeout=max(0.0, seconds)):
                return True
        except BaseException:
            if not self._withdraw(own):
                self.release()
            raise
        return not self._withdraw(own)

    def release(self) -> None:
        """Release the lock, or pass it to the thread that has waited longest."""
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._is_held = False

    def _withdraw(self, own: Lock) -> bool:
        """Stop waiting. Returns False if the lock was handed over in the meantime."""
        with self._guard, suppress(ValueError):
            self._waiting.remove(own)
            return True
        return False


class Turnstile:
    """Admits one process at a time to wait for a database's write lock. Other processes wait for the turnstile."""

    def __init__(self, database: Path) -> None:
        self._path = database.with_name(database.name + SUFFIX)

    @contextmanager
    def held(self, deadline: float) -> Generator[None]:
        """Hold the turnstile. deadline: monotonic seconds. Raises Unavailable if it is not free by then."""
        descriptor = self._open()
        try:
            while not _try_lock(descriptor):
                wait_until_next_poll(deadline)
            yield
        finally:
            os.close(descriptor)  # releases the lock

    def _open(self) -> int:
        """Open the file for a single use, so that no forked child shares the lock.

        Only the file's owner can open it, so other users of the machine can't block writers.
        """
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _not_opened(self._path, error) from error


def wait_until_next_poll(deadline: float) -> None:
    """Sleep for POLL_SECONDS. Raises Unavailable after the deadline, in monotonic seconds."""
    if time.monotonic() >= deadline:
        raise busy()
    time.sleep(POLL_SECONDS)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _not_opened(path: Path, error: OSError) -> OutOfSpace | Unavailable:
    if is_full(error):
        return disk_full()
    return Unavailable(
        "database_lock_too_many_files"
        if error.errno in (errno.EMFILE, errno.ENFILE)
        else (
            "database_lock_folder_missing"
            if error.errno == errno.ENOENT
            else ("database_lock_folder_read_only" if error.errno == errno.EROFS else "database_lock_folder_denied")
        ),
        path=path.name,
        strerror=str(error.strerror),
    )
