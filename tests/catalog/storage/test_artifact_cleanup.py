"""Deletion of unreferenced artifacts, and the age of objects on which it depends, for every kind of store."""

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from catalog.maintenance.backup import references
from catalog.storage.manifest import DamagedArtifact, Manifest
from catalog.storage.object_storage import Objects, StoredObject
from catalog.storage.store import GRACE_SECONDS, ArtifactStore, blob_key, manifest_key
from tests.catalog.storage.conftest import StoreClock, keys


def live(manifest: Manifest) -> set[str]:
    """Return the digests that the database references for an artifact."""
    return {manifest.digest, *(file.digest for file in manifest.files)}


def test_cleanup_keeps_referenced_and_recent_objects(
    store: ArtifactStore, folder: Path, store_clock: StoreClock, tmp_path: Path
) -> None:
    kept = store.put_folder(folder, kind="adapter")
    (folder / "adapter_config.json").write_text('{"r": 4}')
    dropped = store.put_folder(folder, kind="adapter")
    file = store.put_bytes(b"an uploaded file")
    everything = keys(store)

    assert store.delete_unreferenced({*live(kept), file.digest}) == 0
    assert keys(store) == everything

    store_clock.ahead_seconds = GRACE_SECONDS + 60
    assert store.delete_unreferenced({*live(kept), file.digest}) == 2  # the other manifest and its own blob
    assert keys(store) == everything - {manifest_key(dropped.digest), blob_key(sha256(b'{"r": 4}').hexdigest())}
    assert store.verify(kept) == []


def test_damaged_files_are_restored_without_delete_permission(
    store: ArtifactStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(_objects: Objects, key: str) -> None:
        raise AssertionError(f"workers may not delete {key}")

    monkeypatch.setattr(Objects, "delete", denied)
    manifest = store.put_folder(folder, kind="checkpoint")
    damaged = manifest.files[0]
    store.objects.put(blob_key(damaged.digest), b"x" * damaged.num_bytes)

    store.empty_damaged(manifest.digest)
    assert len(store.verify(manifest)) == 1
    store.put_folder(folder, kind="checkpoint")
    assert store.verify(manifest) == []

    store.objects.put(manifest_key(manifest.digest), b"{}")
    store.empty_damaged(manifest.digest)
    assert store.delete_unreferenced(set()) == 0, "an emptied manifest must not block the cleanup"
    store.put_folder(folder, kind="checkpoint")
    assert store.get_manifest(manifest.digest) == manifest


def test_worker_code_deletes_no_object() -> None:
    """The policy for worker credentials in docs/how-to/deploy.md does not allow deletion."""
    root = Path(__file__).parents[3] / "worker"
    deleting = re.compile(r"store\.delete\w*\(|objects\.delete\w*\(")

    assert [path.name for path in root.rglob("*.py") if deleting.search(path.read_text("utf-8"))] == []


def test_storing_a_blob_again_renews_its_age(store: ArtifactStore, store_clock: StoreClock) -> None:
    blob = store.put_bytes(b"old")
    first = store.objects.head(blob_key(blob.digest)).written_at
    store_clock.ahead_seconds = GRACE_SECONDS / 2

    while store.objects.head(blob_key(blob.digest)).written_at == first:  # S3 times have a resolution of one second
        store.put_bytes(b"old")

    assert store.objects.head(blob_key(blob.digest)).written_at > first


def test_cleanup_checks_the_age_again_before_deletion(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = store.put_bytes(b"listed while old, then put again")
    listed = store.objects.list_all

    def list_as_it_was(prefix: str) -> Iterator[Any]:
        for entry in listed(prefix):
            yield type(entry)(key=entry.key, num_bytes=entry.num_bytes, written_at=0)

    monkeypatch.setattr(store.objects, "list_all", list_as_it_was)
    assert store.delete_unreferenced(set()) == 0
    assert b"".join(store.open_blob(blob.digest)) == b"listed while old, then put again"


@pytest.mark.parametrize("is_committed", [True, False])
def test_object_stored_again_during_the_cleanup_is_not_lost(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, is_committed: bool
) -> None:
    """The database row of the object is committed after the cleanup, or never."""
    blob = store.put_bytes(b"put again")
    key = blob_key(blob.digest)
    listed, head = store.objects.list_all, store.objects.head

    def old(entry: StoredObject) -> StoredObject:
        return replace(entry, written_at=0.0) if entry.key == key else entry

    def head_before_another_put(wanted: str) -> StoredObject:
        entry = old(head(wanted))
        store.objects.put(key, b"put again")
        return entry

    with monkeypatch.context() as patch:
        patch.setattr(store.objects, "list_all", lambda prefix: map(old, listed(prefix)))
        patch.setattr(store.objects, "head", head_before_another_put)
        assert store.delete_unreferenced(set()) == 1

    assert b"".join(store.open_blob(blob.digest)) == b"put again"
    assert references.damaged([key], store.objects) == {}
    store.delete_unreferenced({blob.digest} if is_committed else set())
    assert (key in keys(store)) == is_committed
    assert b"".join(store.open_blob(blob.digest)) == b"put again", "another upload may still commit a row"


def test_unreferenced_object_is_deleted_permanently(store: ArtifactStore, store_clock: StoreClock) -> None:
    blob = store.put_bytes(b"garbage")
    store_clock.ahead_seconds = 2 * GRACE_SECONDS

    store.delete_unreferenced(set())

    assert list(store.objects.list_all("")) == []
    with pytest.raises(DamagedArtifact, match="is missing"):
        store.open_blob(blob.digest)


def test_cleanup_continues_despite_an_unreadable_live_manifest(
    store: ArtifactStore, folder: Path, store_clock: StoreClock
) -> None:
    manifest = store.put_folder(folder, kind="adapter")
    garbage = store.put_bytes(b"garbage")
    store.objects.put(manifest_key(manifest.digest), b"{}")
    before = keys(store)
    store_clock.ahead_seconds = 2 * GRACE_SECONDS

    num_deleted = store.delete_unreferenced(live(manifest))

    assert num_deleted == 1
    assert keys(store) == before - {blob_key(garbage.digest)}


def test_cleanup_keeps_old_files_of_a_recent_manifest(
    store: ArtifactStore, folder: Path, store_clock: StoreClock
) -> None:
    """A worker has stored an artifact whose row is not committed yet."""
    in_flight = store.put_folder(folder, kind="adapter")
    store.objects.put(manifest_key("0" * 64), b"{}")
    before = keys(store)
    store_clock.ahead_seconds = 2 * GRACE_SECONDS
    listed, head = store.objects.list_all, store.objects.head

    def as_written_now(entry: StoredObject) -> StoredObject:
        return replace(entry, written_at=store_clock()) if entry.key.startswith("manifests/") else entry

    store.objects.list_all = lambda prefix: map(as_written_now, listed(prefix))
    store.objects.head = lambda key: as_written_now(head(key))

    assert store.delete_unreferenced(set()) == 0
    assert keys(store) == before
    assert store.verify(in_flight) == []


@pytest.mark.parametrize("hours", [48, -48])
def test_wrong_local_clock_does_not_age_objects(
    clock_and_url: tuple[StoreClock, str], monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """An upload is in progress: its blob is stored, and its row is not committed yet."""
    store = ArtifactStore(Objects(clock_and_url[1]))
    blob = store.put_bytes(b"in flight")
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + hours * 3600)

    assert ArtifactStore(Objects(clock_and_url[1])).delete_unreferenced(set()) == 0
    assert b"".join(store.open_blob(blob.digest)) == b"in flight"


def test_leftovers_of_a_killed_writer_are_cleaned_up(tmp_path: Path) -> None:
    clock = StoreClock()
    store = ArtifactStore(Objects((tmp_path / "store").as_uri()), clock=clock)
    blob = store.put_bytes(b"x")
    left = tmp_path / "store" / (blob_key(blob.digest) + "#1")
    left.write_bytes(b"half")

    store.delete_unreferenced({blob.digest})
    assert left.exists()
    clock.ahead_seconds = 2 * GRACE_SECONDS
    store.delete_unreferenced({blob.digest})
    assert not left.exists()
