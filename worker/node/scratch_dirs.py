"""Folders that are deleted when their owner exits. A lock on a file next to each folder shows whether its owner runs.

A killed worker leaves its folders behind. The next worker that starts deletes the folders whose lock is free.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

SUFFIX = ".lock"


@contextmanager
def owned(path: Path) -> Generator[Path]:
    """Own `path`, which the caller creates, for the length of the block. Then the folder and its lock are deleted."""
    lock_path = path.with_name(f"{path.name}{SUFFIX}")
    descriptor = _locked(lock_path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # if the disk is read-only now, the next worker that starts deletes it
            lock_path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(lock_path: Path) -> int:
    """Return a descriptor that holds the lock.

    A cleaner may delete the file between its creation and its locking. The lock would then be on a file without a name,
    and no cleaner would ever find the folder. In this case, the lock is taken again.
    """
    while True:
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_current(descriptor, lock_path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_current(descriptor: int, lock_path: Path) -> bool:
    """Return whether the open file is the one that the path names now."""
    try:
        return os.path.samestat(os.fstat(descriptor), lock_path.stat())
    except FileNotFoundError:
        return False


def clean(parent: Path) -> list[str]:
    """Delete the folders in `parent` whose owner has exited. Returns their names."""
    return [lock_path.stem for lock_path in parent.glob(f"*{SUFFIX}") if _clean_one(lock_path)]


def _clean_one(lock_path: Path) -> bool:
    try:
        descriptor = os.open(lock_path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_current(descriptor, lock_path):
            return False
    except BlockingIOError:
        return False
    else:
        shutil.rmtree(lock_path.with_suffix(""), ignore_errors=True)
        lock_path.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)
