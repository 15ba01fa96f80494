"""A thread that outlives the lease of its endpoint damages no files that the next keeper has written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from api.serving import adapter_files
from api.serving.held_lease import LeaseLost
from catalog.storage.manifest import Manifest
from catalog.storage.object_storage import Objects
from catalog.storage.store import ArtifactStore

WEIGHTS = "adapter_model.safetensors"


def valid() -> None:
    """Check of a process that holds the lease."""


def lost() -> None:
    raise LeaseLost


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(Objects((tmp_path / "store").as_uri()))


@pytest.fixture
def manifest(store: ArtifactStore, tmp_path: Path) -> Manifest:
    source = tmp_path / "source"
    source.mkdir()
    (source / WEIGHTS).write_bytes(b"weights")
    (source / "adapter_config.json").write_bytes(b"{}")
    return store.put_folder(source, kind="adapter")


@pytest.fixture
def path(tmp_path: Path, manifest: Manifest) -> Path:
    return adapter_files.adapter_path(tmp_path / "served" / "lorry", adapter_id="adapter-1", manifest=manifest)


def once(act: Callable[[], None]) -> Callable[[], None]:
    """Return a check that acts as another process at its first call."""
    waiting = [act]
    return lambda: waiting.pop()() if waiting else None


def contents(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in path.iterdir()}


@pytest.mark.parametrize("is_damaged", [False, True], ids=["absent before", "damaged before"])
def test_late_copy_leaves_the_files_of_the_next_keeper_in_place(
    store: ArtifactStore, manifest: Manifest, path: Path, is_damaged: bool
) -> None:
    if is_damaged:
        adapter_files.put(store, path, manifest, check=valid)
        (path / WEIGHTS).write_bytes(b"damaged")
    loaded: dict[str, int] = {}

    def next_keeper() -> None:
        adapter_files.put(store, path, manifest, check=valid)
        loaded.update({entry.name: entry.stat().st_ino for entry in path.iterdir()})

    adapter_files.put(store, path, manifest, check=once(next_keeper))

    assert contents(path) == {WEIGHTS: b"weights", "adapter_config.json": b"{}"}
    assert {entry.name: entry.stat().st_ino for entry in path.iterdir()} == loaded
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_copy_ends_without_a_trace_when_its_lease_is_lost(store: ArtifactStore, manifest: Manifest, path: Path) -> None:
    with pytest.raises(LeaseLost):
        adapter_files.put(store, path, manifest, check=lost)

    assert list(path.parent.iterdir()) == []


def test_damaged_file_is_replaced_while_the_folder_stays(store: ArtifactStore, manifest: Manifest, path: Path) -> None:
    adapter_files.put(store, path, manifest, check=valid)
    before = path.stat().st_ino
    (path / WEIGHTS).write_bytes(b"damaged")

    adapter_files.put(store, path, manifest, check=valid)

    assert (contents(path)[WEIGHTS], path.stat().st_ino) == (b"weights", before)
    assert (path / WEIGHTS).stat().st_mode & 0o777 == 0o644


def test_folder_whose_removal_broke_off_is_removed(store: ArtifactStore, manifest: Manifest, path: Path) -> None:
    adapter_files.put(store, path, manifest, check=valid)
    left = path.with_name(f"{adapter_files.REMOVED}adapter-2.0")
    left.mkdir()

    adapter_files.remove_others(path.parent, {path.name}, check=valid)

    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("kept", [set[str](), {"other"}], ids=["whole folder", "one adapter"])
def test_removal_stops_when_its_lease_is_lost(
    store: ArtifactStore, manifest: Manifest, path: Path, kept: set[str]
) -> None:
    adapter_files.put(store, path, manifest, check=valid)

    with pytest.raises(LeaseLost):
        adapter_files.remove_others(path.parent, kept, check=lost)

    assert contents(path)[WEIGHTS] == b"weights"


@pytest.mark.parametrize("kept", [set[str](), {"other"}], ids=["whole folder", "one adapter"])
def test_removal_that_takes_long_does_not_touch_what_the_next_keeper_writes(
    store: ArtifactStore, manifest: Manifest, path: Path, kept: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter_files.put(store, path, manifest, check=valid)
    remove = shutil.rmtree

    def slow(folder: Path, *, ignore_errors: bool) -> None:
        monkeypatch.setattr(shutil, "rmtree", remove)
        adapter_files.put(store, path, manifest, check=valid)
        remove(folder, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", slow)
    adapter_files.remove_others(path.parent, kept, check=valid)

    assert contents(path) == {WEIGHTS: b"weights", "adapter_config.json": b"{}"}


@pytest.mark.parametrize("keeps", [False, True])
def test_symbolic_link_in_place_of_the_folder_is_removed_and_not_followed(tmp_path: Path, keeps: bool) -> None:
    other = tmp_path / "other"
    (other / "private").mkdir(parents=True)
    folder = tmp_path / "lorry"
    folder.symlink_to(other)

    adapter_files.remove_others(folder, {"adapter-1"} if keeps else set(), check=valid)

    assert (other / "private").is_dir()
    assert not folder.is_symlink()
    assert list(tmp_path.iterdir()) == [other]
