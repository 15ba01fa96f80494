"""Artifacts in every kind of store: what is stored, fetched and refused. The cleanup has its own file."""

import errno
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import obstore
import pytest
from hypothesis import given
from hypothesis import strategies as st
from obstore.exceptions import GenericError, PermissionDeniedError

from catalog.error_texts import ErrorText
from catalog.errors import OutOfSpace, Unavailable
from catalog.settings import Settings
from catalog.storage.manifest import DamagedArtifact, Manifest, ManifestFile, check_path
from catalog.storage.object_storage import CHUNK_BYTES, Objects
from catalog.storage.store import ArtifactStore, blob_key, manifest_key, open_store
from tests.catalog.storage.conftest import LARGE, StoreClock, keys
from tests.services.running import closed_port
from tests.services.small_disk import small_disk


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_stored_folder_is_fetched_unchanged(store: ArtifactStore, folder: Path, tmp_path: Path) -> None:
    manifest = store.put_folder(folder, kind="adapter")

    store.fetch(store.get_manifest(manifest.digest), tmp_path / "a" / "copy")

    assert tree(tmp_path / "a" / "copy") == tree(folder)
    assert store.verify(manifest) == []
    assert manifest.num_bytes == len(LARGE) + 2
    assert [file.path for file in manifest.files] == sorted(tree(folder))


def test_blob_is_named_by_its_content_and_streams_in_bounded_chunks(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(LARGE)

    blob = store.put_file(tmp_path / "x")

    chunks = list(store.open_blob(blob.digest))
    assert blob.digest == sha256(LARGE).hexdigest()
    assert b"".join(chunks) == LARGE
    assert max(len(chunk) for chunk in chunks) <= CHUNK_BYTES


def test_unreadable_subfolder_publishes_nothing(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, opened = tmp_path / "out", os.open
    (root / "sub").mkdir(parents=True)
    (root / "a").write_bytes(b"a")
    (root / "sub" / "b").write_bytes(b"b")

    def refuse(path: Any, *arguments: Any, **given: Any) -> int:
        if path == "sub":
            raise PermissionError(13, "Permission denied", path)
        return opened(path, *arguments, **given)

    monkeypatch.setattr(os, "open", refuse)

    with pytest.raises(PermissionError):
        store.put_folder(root, kind="adapter")


def test_folder_with_an_unsafe_name_blames_the_worker_that_wrote_it(store: ArtifactStore, tmp_path: Path) -> None:
    root = tmp_path / "out"
    root.mkdir()
    (root / "a\nb").write_bytes(b"a")

    with pytest.raises(DamagedArtifact, match=r"Folder 'out' can't be stored\. The manifest ") as refusal:
        store.put_folder(root, kind="adapter")
    assert refusal.value.remedy.startswith("If this recurs, reinstall Lorry on the worker")


def test_storing_the_same_folder_again_writes_nothing(
    store: ArtifactStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store.put_folder(folder, kind="adapter")

    def never(key: str, chunks: Any) -> None:
        raise AssertionError(key)

    monkeypatch.setattr(store.objects, "put", never)
    assert store.put_folder(folder, kind="adapter") == first


def test_manifest_is_written_after_every_blob(
    store: ArtifactStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    put = store.objects.put
    monkeypatch.setattr(store.objects, "put", lambda key, chunks: (written.append(key), put(key, chunks)))

    manifest = store.put_folder(folder, kind="adapter")

    assert written[-1] == manifest_key(manifest.digest)
    assert set(written[:-1]) == {blob_key(file.digest) for file in manifest.files}


def test_file_that_changes_during_storage_is_not_stored(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "growing"
    path.write_bytes(LARGE)
    os.utime(path, (1, 1))  # file systems may record two changes within milliseconds with the same time
    put = store.objects.put

    def put_after_a_change(key: str, chunks: Any) -> None:
        path.write_bytes(LARGE[:-1] + b"!")
        put(key, chunks)

    monkeypatch.setattr(store.objects, "put", put_after_a_change)
    with pytest.raises(DamagedArtifact, match=f"{path.name!r} changed while") as caught:
        store.put_file(path)

    assert "no other program writes the file" in caught.value.remedy
    assert keys(store) == set()


def test_changed_blob_is_detected_by_every_reader(store: ArtifactStore, folder: Path, tmp_path: Path) -> None:
    manifest = store.put_folder(folder, kind="adapter")
    digest = sha256(LARGE).hexdigest()
    store.objects.put(blob_key(digest), b"?" + LARGE[1:])

    with pytest.raises(DamagedArtifact):
        list(store.open_blob(digest))
    with pytest.raises(DamagedArtifact):
        store.fetch(manifest, tmp_path / "copy")

    assert [p.name for p in tmp_path.iterdir() if "copy" in p.name] == []
    assert store.verify(manifest) == [
        f"deep/er/model.safetensors: Object {digest} has changed: its content does not match its digest."
    ]


def test_missing_blob_or_manifest_is_reported_before_reading(store: ArtifactStore, folder: Path) -> None:
    manifest = store.put_folder(folder, kind="adapter")
    for key in keys(store):
        store.objects.delete(key)

    with pytest.raises(DamagedArtifact, match="missing"):
        store.open_blob(manifest.files[0].digest)
    with pytest.raises(DamagedArtifact, match="missing"):
        store.get_manifest(manifest.digest)
    assert len(store.verify(manifest)) == 3


def test_changed_manifest_is_rejected(store: ArtifactStore, folder: Path) -> None:
    manifest = store.put_folder(folder, kind="adapter")
    store.objects.put(manifest_key(manifest.digest), manifest.canonical().replace(b"adapter_config", b"adapter_CONFIG"))

    with pytest.raises(DamagedArtifact, match="has changed"):
        store.get_manifest(manifest.digest)


def test_digest_that_is_a_path_is_rejected(store: ArtifactStore) -> None:
    for digest in ("../../etc/passwd", "A" * 64, "", "a" * 63 + "\n"):
        with pytest.raises(DamagedArtifact):
            store.open_blob(digest)
        with pytest.raises(DamagedArtifact):
            store.get_manifest(digest)


def test_fetch_does_not_touch_a_non_empty_folder(store: ArtifactStore, folder: Path, tmp_path: Path) -> None:
    manifest = store.put_folder(folder, kind="adapter")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "mine").write_text("kept")

    with pytest.raises(OSError, match="not empty"):
        store.fetch(manifest, tmp_path / "copy")

    assert tree(tmp_path / "copy") == {"mine": b"kept"}


def test_time_of_a_full_bucket_is_read_from_the_last_probe(
    clock_and_url: tuple[StoreClock, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = Objects(clock_and_url[1])
    before = objects.now()

    def full(*_: Any) -> None:
        raise OutOfSpace(ErrorText(code="out_of_space", message="full", remedy=""))

    monkeypatch.setattr(objects, "put", full)

    assert objects.now() >= before


def test_object_is_created_only_once(store: ArtifactStore) -> None:
    assert [store.objects.create("lease", content) for content in (b"first", b"second")] == [True, False]
    assert b"".join(store.objects.read("lease")) == b"first"


def test_stored_file_and_its_folders_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    root = tmp_path / "new" / "store"
    store = ArtifactStore(Objects(root.as_uri()))

    blob = store.put_bytes(b"x")

    path = root / blob_key(blob.digest)
    expected = {path, path.parent, root / "blobs", root, tmp_path / "new", tmp_path}
    assert {str(folder) for folder in expected} <= set(synced)


def test_reachable_store_passes_the_check(store: ArtifactStore) -> None:
    store.check_reachable()


def test_unreachable_bucket_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setattr("catalog.storage.object_storage.RETRY", {"max_retries": 0})

    with closed_port() as port:
        monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{port}")
        with pytest.raises(Unavailable) as caught:
            ArtifactStore(Objects("s3://nowhere")).check_reachable()

    assert caught.value.code == "store_unavailable"
    assert "LORRY_STORE_URL" in caught.value.remedy


@pytest.mark.parametrize(
    ("failure", "message", "remedy"),
    [
        (PermissionDeniedError("secret"), "The artifact store denied access", "Correct the permissions"),
        (PermissionError(errno.EACCES, "no"), "The artifact store denied access", "Correct the permissions"),
        (OSError(errno.EIO, "Input/output error"), "can't be accessed: Input/output error", "Try again"),
        (GenericError("secret"), "The artifact store can't be accessed", "Try again"),
    ],
)
def test_error_of_the_store_has_a_matching_remedy(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, failure: Exception, message: str, remedy: str
) -> None:
    def head(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(obstore, "head", head)
    with pytest.raises(Unavailable) as caught:
        store.check_reachable()

    folder = f": the user with ID {os.geteuid()} can't use the folder {store.objects.folder}"
    assert caught.value.message.endswith(f"{message}{folder if 'denied' in message and store.objects.folder else ''}.")
    assert caught.value.remedy.startswith(remedy)


def test_error_of_another_location_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(Unavailable, match="The backup location can't be accessed") as caught:
        Objects((tmp_path / "file" / "store").as_uri(), name="The backup location", checked="the disk")

    assert caught.value.remedy.endswith("check the disk.")


@pytest.mark.parametrize("num_bytes", [100_000, len(LARGE)])
def test_full_disk_is_reported_and_keeps_nothing(tmp_path: Path, num_bytes: int) -> None:
    (tmp_path / "x").write_bytes(LARGE[:num_bytes])
    with small_disk(tmp_path / "disk", 65_536) as disk:
        store = open_store(Settings.model_validate({"data_dir": disk}))

        with pytest.raises(OutOfSpace) as caught:
            store.put_file(tmp_path / "x")

        assert caught.value.code == "out_of_space"
        assert [path for path in disk.rglob("*") if path.is_file()] == []


def test_fetch_onto_a_full_disk_is_reported_and_keeps_nothing(tmp_path: Path, folder: Path) -> None:
    store = open_store(Settings.model_validate({"data_dir": tmp_path}))
    manifest = store.put_folder(folder, kind="adapter")
    with small_disk(tmp_path / "disk", 65_536) as disk:
        with pytest.raises(OutOfSpace):
            store.fetch(manifest, disk / "copy")

        assert list(disk.iterdir()) == []


def test_symlinks_are_not_followed_into_the_store(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "passwd").symlink_to("/etc/passwd")

    with pytest.raises(DamagedArtifact, match="not a regular file"):
        open_store(Settings.model_validate({"data_dir": tmp_path})).put_folder(tmp_path / "adapter", kind="adapter")


BAD_PATHS = [
    "",
    "/etc/passwd",
    "../x",
    "a/../b",
    "a//b",
    "a/",
    "./a",
    "a\\b",
    "C:x",
    "a\0b",
    "a\nb",
    "\u202ea",
    "x" * 257,
]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_path_that_could_leave_its_folder_is_rejected(path: str) -> None:
    with pytest.raises(DamagedArtifact):
        ManifestFile(path=path, digest="0" * 64, num_bytes=1)


@given(st.text(max_size=40))
def test_accepted_paths_stay_inside_the_folder(path: str) -> None:
    try:
        check_path(path)
    except DamagedArtifact:
        return
    assert Path(os.path.normpath(Path("/root/of/it") / path)).is_relative_to("/root/of/it")


def test_manifest_with_conflicting_or_duplicate_paths_is_rejected() -> None:
    files = [ManifestFile(path=path, digest="0" * 64, num_bytes=1) for path in ("a", "a/b", "c")]
    with pytest.raises(DamagedArtifact, match="also a file"):
        Manifest.of("adapter", files)
    with pytest.raises(DamagedArtifact, match="twice"):
        Manifest.of("adapter", [files[0], files[0]])


ENTRY = b'{"path": "a", "digest": "%s", "num_bytes": %s}'
NO_MANIFESTS = [
    b"",
    b"[]",
    b"{}",
    b"\xff",
    b"[" * 100_000,
    b'{"kind": "adapter"}',
    b'{"kind": "adapter", "files": 7}',
    b'{"kind": "adapter", "files": [{}]}',
    b'{"kind": "adapter", "files": [%s]}' % (ENTRY % (b"00", b"1")),
    b'{"kind": "adapter", "files": [%s]}' % (ENTRY % (b"0" * 64, b"true")),
    b'{"kind": 7, "files": []}',
    b'{"kind": "Adapter!", "files": []}',
]


@pytest.mark.parametrize("content", NO_MANIFESTS)
def test_bytes_that_are_no_manifest_are_rejected(content: bytes) -> None:
    with pytest.raises(DamagedArtifact):
        Manifest.parse(content)


def test_manifest_is_equal_from_bytes_and_from_rows() -> None:
    manifest = Manifest.of("tokens", [ManifestFile(path="ü/b", digest="1" * 64, num_bytes=2)])

    assert Manifest.parse(manifest.canonical()) == manifest
    assert Manifest.from_rows("tokens", manifest.as_rows()) == manifest
    assert manifest.digest == sha256(manifest.canonical()).hexdigest()
