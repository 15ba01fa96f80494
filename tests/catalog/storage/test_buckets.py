"""A bucket is created once, and only if it is missing."""

from __future__ import annotations

import secrets
from email.message import Message
from typing import Any
from unittest.mock import Mock
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

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


def answer(status: int) -> HTTPError:
    return HTTPError("http://store", status, "rejected", Message(), None)


def test_bucket_that_cannot_be_created_is_named_with_the_fix(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_storage, "urlopen", Mock(side_effect=answer(403)))

    with pytest.raises(InvalidRequest, match=r"'lorry-\w+' of LORRY_STORE_URL does not exist.*403") as caught:
        create_missing_bucket(missing)

    assert "Create the bucket" in caught.value.remedy


def test_bucket_that_another_process_creates_at_the_same_time_is_used(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_too_late(*given: Any, **named: Any) -> None:
        urlopen(*given, **named).close()
        raise answer(409)

    monkeypatch.setattr(object_storage, "urlopen", create_too_late)

    create_missing_bucket(missing)

    Objects(missing).put("key", b"content")


@pytest.mark.parametrize("error", [TimeoutError("timed out"), URLError(TimeoutError("timed out"))])
def test_store_that_does_not_answer_in_time_is_unavailable(
    missing: str, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    monkeypatch.setattr(object_storage, "urlopen", Mock(side_effect=error))

    with pytest.raises(Unavailable) as caught:
        create_missing_bucket(missing)

    assert caught.value.code == "store_unavailable"


@pytest.mark.parametrize(
    "endpoint", [None, "https://s3.eu-central-1.amazonaws.com", "https://s3.cn-north-1.amazonaws.com.cn"]
)
def test_no_bucket_is_created_in_aws(missing: str, monkeypatch: pytest.MonkeyPatch, endpoint: str | None) -> None:
    monkeypatch.delenv("AWS_ENDPOINT")
    if endpoint is not None:
        monkeypatch.setenv("AWS_ENDPOINT", endpoint)
    monkeypatch.setattr(object_storage, "_bucket_exists", lambda _: False)
    monkeypatch.setattr(object_storage, "urlopen", Mock(side_effect=AssertionError("a request")))

    with pytest.raises(InvalidRequest, match="does not exist, and Lorry creates no buckets in AWS") as caught:
        create_missing_bucket(missing)

    assert "aws s3 mb s3://lorry-" in caught.value.remedy


def test_store_that_does_not_answer_is_not_a_missing_bucket(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_storage, "RETRY", {"max_retries": 0})
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:1")

    with pytest.raises(Unavailable):
        create_missing_bucket(missing)


def test_folder_needs_no_bucket() -> None:
    create_missing_bucket("file:///nowhere/store")
