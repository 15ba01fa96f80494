"""Ensures one `lorry up` per data folder with a file lock, which the kernel releases when its holder dies."""

from __future__ import annotations

import fcntl
import os
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


def _held(data_dir: Path, holder: str) -> LorryError:
    return LorryError(
        f"Lorry is already running on {data_dir}{f' (process {holder})' if holder else ''}.",
        code="already_running",
        remedy="Use the running service, stop it first, or set another folder with --data-dir.",
    )
