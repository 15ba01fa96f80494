"""Every kind of store: a local folder, and a bucket behind an S3 server."""

import os
import time
from pathlib import Path

import pytest

from catalog.storage.object_storage import Objects
from catalog.storage.store import ArtifactStore
from tests.services.s3 import new_bucket

LARGE = os.urandom(1 << 20) * 17
"""Larger than two parts of a multipart upload."""


class StoreClock:
    """The clock of a store, which the test controls."""

    def __init__(self) -> None:
        self.ahead_seconds = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_seconds


@pytest.fixture(params=["folder", "bucket"])
def clock_and_url(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[StoreClock, str]:
    if request.param == "folder":
        return StoreClock(), (tmp_path / "store room").as_uri()
    bucket = new_bucket(request.getfixturevalue("s3_endpoint"))
    for name, value in bucket.environment().items():
        monkeypatch.setenv(name, value)
    return StoreClock(), f"s3://{bucket.name}/a/prefix"


@pytest.fixture
def store_clock(clock_and_url: tuple[StoreClock, str]) -> StoreClock:
    return clock_and_url[0]


@pytest.fixture
def store(clock_and_url: tuple[StoreClock, str]) -> ArtifactStore:
    clock, url = clock_and_url
    return ArtifactStore(Objects(url), clock=clock)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "empty").write_bytes(b"")
    (folder / "deep" / "er" / "model.safetensors").write_bytes(LARGE)
    return folder


def keys(store: ArtifactStore) -> set[str]:
    return {entry.key for prefix in ("blobs", "manifests") for entry in store.objects.list_all(prefix)}
