"""A bucket is created once, and only if it is missing."""

from __future__ import annotations

import secrets

import pytest

from catalog.errors import InvalidRequest, Unavailable
from catalog.storage import object_storage
from catalog.storage.object_storage import Objects, create_missing_bucket
from tests.services.s3 import Bucket


@pytest.fixture
def missing(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of a bucket that does not exist."""
    name = f"lorry-{secrets.token_hex(6)}"
    for variable, value in Bucket(name=name, endpoint=s3_endpoint).environment().items():
        monkeypatch.setenv(variable, value)
    return f"s3://{name}/prefix"


def test_missing_bucket_is_created_once_and_keeps_its_objects(missing: str) -> None:
    create_missing_bucket(missing)
    Objects(missing).put("key", b"content")

    create_missing_bucket(missing)

    assert b"".join(Objects(missing).read("key")) == b"content"


def test_bucket_that_cannot_be_created_is_named_with_the_fix(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def rejected(*_: object, **__: object) -> None:
        raise OSError("HTTP Error 403: Forbidden")

    monkeypatch.setattr(object_storage, "urlopen", rejected)

    with pytest.raises(InvalidRequest, match=r"'lorry-\w+' of LORRY_STORE_URL does not exist.*403") as caught:
        create_missing_bucket(missing)

    assert "Create the bucket" in caught.value.remedy


def test_store_that_does_not_answer_is_not_a_missing_bucket(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_storage, "RETRY", {"max_retries": 0})
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:1")

    with pytest.raises(Unavailable):
        create_missing_bucket(missing)


def test_folder_needs_no_bucket() -> None:
    create_missing_bucket("file:///nowhere/store")
