"""Folders that live no longer than their owner: a lock on a file beside each tells whether it does.

A killed worker leaves its folders behind; the next one to start clears those away whose lock is free.
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
    """Own `path` (not created here) for the block's length; after it both folder and lock are gone."""
    lock_path = path.with_name(f"{path.name}{SUFFIX}")
    descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # on a disk that is read-only now: the next worker to start clears it away
            lock_path.unlink(missing_ok=True)
        os.close(descriptor)


def clean(parent: Path) -> list[str]:
    """Delete the folders in `parent` whose owner has gone. Returns their names."""
    return [lock_path.stem for lock_path in parent.glob(f"*{SUFFIX}") if _clean_one(lock_path)]


def _clean_one(lock_path: Path) -> bool:
    try:
        descriptor = os.open(lock_path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        shutil.rmtree(lock_path.with_suffix(""), ignore_errors=True)
        lock_path.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)
