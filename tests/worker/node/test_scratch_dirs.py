"""A folder that is owned is there for its owner, and is deleted by the next cleaning once its owner has gone."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from worker.node import scratch_dirs


def test_a_cleaner_that_deletes_the_lock_before_it_is_taken_does_not_leave_the_folder_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, cleaned = fcntl.flock, list[list[str]]()

    def lock_after_a_cleaner(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX and not cleaned:
            cleaned.append([])  # the cleaner's own locking comes through here too
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


def test_a_cleaner_that_opened_the_lock_of_an_earlier_owner_leaves_the_next_owners_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lock_path = tmp_path / "work", tmp_path / "work.lock"
    lock_path.touch()
    lock = fcntl.flock

    def lock_too_late(descriptor: int, operation: int) -> None:
        lock_path.unlink()  # the earlier owner has finished, and another one begins
        lock_path.touch()
        folder.mkdir()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lock_too_late)

    assert scratch_dirs.clean(tmp_path) == []
    assert folder.is_dir()
    assert lock_path.exists()


def test_the_folder_of_an_owner_that_was_killed_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "work.lock").touch()
    (tmp_path / "work").mkdir()

    assert scratch_dirs.clean(tmp_path) == ["work"]
    assert list(tmp_path.iterdir()) == []
