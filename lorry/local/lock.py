"""Ensures one `lorry up` per data folder with a file lock, which the kernel releases when its holder dies."""

from __future__ import annotations

import fcntl
import os
import shlex
from pathlib import Path
from types import TracebackType
from typing import Self

from lorry.errors import LorryError

FILE_NAME = "up.lock"


class DataLock:
    """Holds the lock for the duration of a `with` block. Raises LorryError if another process holds it."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._descriptor = -1

    def __enter__(self) -> Self:
        descriptor = os.open(self._data_dir / FILE_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise _held(self._data_dir, holder) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        self._descriptor = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)  # keep the file: after a removal, two processes could lock two different files


def holder(data_dir: Path) -> int | None:
    """Return the id of the process that holds the lock of a data folder; None if none does.

    The kernel releases the lock when its holder dies. The id in the file alone is no proof, because a process that
    has just taken the lock has not yet replaced the id of the previous holder. So the process must also have the file
    open, where /proc can show that.
    """
    try:
        descriptor = os.open(data_dir / FILE_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        written = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        return int(written) if written.isdecimal() and _has_open(int(written), os.fstat(descriptor)) else None
    else:
        return None
    finally:
        os.close(descriptor)


def _has_open(pid: int, file: os.stat_result) -> bool:
    descriptors = Path(f"/proc/{pid}/fd")
    if not Path("/proc/self/fd").is_dir():
        return True  # macOS
    try:
        return any(os.path.samestat(entry.stat(), file) for entry in descriptors.iterdir() if entry.exists())
    except OSError:  # it has exited, or belongs to another user
        return False


def _held(data_dir: Path, holder: str) -> LorryError:
    if holder:
        return LorryError(
            "already_running", data_dir=str(data_dir), holder=holder, quoted_data_dir=shlex.quote(str(data_dir))
        )
    return LorryError(
        "already_running_unknown_process", data_dir=str(data_dir), quoted_data_dir=shlex.quote(str(data_dir))
    )
