"""An owned folder exists for its owner. After the owner is gone, the next cleanup deletes it."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from worker.node import scratch_dirs


def test_an_owner_locks_again_if_a_cleanup_deleted_its_lock_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, cleaned = fcntl.flock, list[list[str]]()

    def lock_after_a_cleaner(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX and not cleaned:
            cleaned.append([])  # the cleanup calls this function too
            cleaned[0] = scratch_dirs.clean(tmp_path)
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lock_after_a_cleaner)

    with scratch_dirs.owned(tmp_path / "work") as folder:
        folder.mkdir()
        taken = (tmp_path / "work.lock").exists()
        found_while_owned = scratch_dirs.clean(tmp_path)
        is_there = folder.is_dir()

    assert cleaned == [["work"]]
    assert (taken, found_while_owned, is_there) == (True, [], True)
    assert list(tmp_path.iterdir()) == []


def test_a_cleanup_with_the_lock_of_an_earlier_owner_keeps_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lock_path = tmp_path / "work", tmp_path / "work.lock"
    lock_path.touch()
    lock = fcntl.flock

    def lock_too_late(descriptor: int, operation: int) -> None:
        lock_path.unlink()  # the earlier owner finishes, and another one starts
        lock_path.touch()
        folder.mkdir()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lock_too_late)

    assert scratch_dirs.clean(tmp_path) == []
    assert folder.is_dir()
    assert lock_path.exists()


def test_the_folder_of_a_killed_owner_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "work.lock").touch()
    (tmp_path / "work").mkdir()

    assert scratch_dirs.clean(tmp_path) == ["work"]
    assert list(tmp_path.iterdir()) == []
