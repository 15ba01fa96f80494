"""A file in parts over HTTP: its forms, its limits, its refusals."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.app import create_app
from api.deps import Services
from api.settings import ApiSettings
from catalog.settings import Settings
from catalog.storage import multipart_uploads
from tests.api.site import chat_lines, error_of

BODY_BYTES = 2**12
"""Of every body that is no upload."""
CONTENT = chat_lines(4)
ANNOUNCED = {"bytes": len(CONTENT), "filename": "a.jsonl", "mime_type": "application/jsonl", "purpose": "fine-tune"}


@pytest.fixture
def app(settings: Settings) -> Iterator[FastAPI]:
    app = create_app(settings, ApiSettings(max_body_bytes=BODY_BYTES))
    yield app
    app.state.services.db.close()


def begin(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/uploads", json={**ANNOUNCED, **fields})


def add(client: TestClient, upload_id: str, content: bytes) -> Any:
    return client.post(f"/v1/uploads/{upload_id}/parts", files={"data": ("upload", content)})


def test_a_file_comes_in_parts_and_is_there_once_it_is_completed(client: TestClient, services: Services) -> None:
    lifetime = {"anchor": "created_at", "seconds": 3600}
    begun = begin(client, expires_after=lifetime).json()
    parts = [add(client, begun["id"], content).json() for content in (CONTENT[:100], CONTENT[100:])]

    done = client.post(f"/v1/uploads/{begun['id']}/complete", json={"part_ids": [part["id"] for part in parts]}).json()

    assert (begun["object"], begun["status"], begun["file"]) == ("upload", "pending", None)
    assert begun["expires_at"] - begun["created_at"] == 3600
    assert {(part["object"], part["upload_id"]) for part in parts} == {("upload.part", begun["id"])}
    assert done == {**begun, "status": "completed", "file": client.get(f"/v1/files/{done['file']['id']}").json()}
    assert done["file"]["expires_at"] == done["file"]["created_at"] + 3600
    assert client.get(f"/v1/files/{done['file']['id']}/content").content == CONTENT
    assert not list((services.settings.data_dir / "spool").glob("*"))


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"bytes": 2**21}, "bytes", "LORRY_MAX_FILE_BYTES"),
        ({"bytes": "many"}, "bytes", "a whole number"),
        ({"purpose": "assistants"}, "purpose", "fine-tune"),
        ({"filename": ""}, "filename", "at least 1 character"),
        ({"expires_after": {"anchor": "created_at", "seconds": 60}}, "expires_after.seconds", "at least 3600"),
        ({"part_size": 5}, "part_size", "part_size"),
    ],
)
def test_an_announcement_that_can_not_be_kept_is_refused(
    client: TestClient, fields: dict[str, Any], param: str, says: str
) -> None:
    error = error_of(begin(client, **fields))

    assert (error["param"], says in error["message"]) == (param, True), error


def test_a_part_may_be_larger_than_other_bodies_and_no_larger_than_a_part(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multipart_uploads, "MAX_PART_BYTES", 2 * BODY_BYTES)
    upload_id = begin(client).json()["id"]

    taken, refused = (add(client, upload_id, b"x" * (2 * BODY_BYTES + more)) for more in (0, 1))
    other = client.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": ["x" * BODY_BYTES]})

    assert taken.status_code == 200, taken.text
    assert (refused.status_code, other.status_code) == (413, 413)
    assert (error_of(refused)["code"], error_of(refused)["param"]) == ("part_too_large", "data")


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"files": {"file": ("x", b"1")}}, "file"),
        ({"files": {"data": ("x", b"1")}, "data": {"purpose": "fine-tune"}}, "purpose"),
        ({"json": {"data": "x"}}, "data"),
    ],
)
def test_a_form_that_is_no_part_is_refused(client: TestClient, form: dict[str, Any], param: str) -> None:
    upload_id = begin(client).json()["id"]

    error = error_of(client.post(f"/v1/uploads/{upload_id}/parts", **form))

    assert error["param"] == param
    assert "'data'" in error["message"]


def test_parts_of_an_upload_that_is_over_or_unknown_are_refused_unread(client: TestClient, services: Services) -> None:
    upload_id = begin(client).json()["id"]
    assert client.post(f"/v1/uploads/{upload_id}/cancel").json()["status"] == "cancelled"

    over, unknown = add(client, upload_id, b"x"), add(client, "upload-none", b"x")
    cancelled = client.post(f"/v1/uploads/{upload_id}/cancel")

    assert (over.status_code, error_of(over)["code"]) == (409, "upload_cancelled")
    assert over.headers["x-should-retry"] == "false"
    assert (unknown.status_code, error_of(unknown)["code"]) == (404, "upload_not_found")
    assert (cancelled.status_code, error_of(cancelled)["code"]) == (409, "upload_cancelled")
    again = client.post(f"/v1/uploads/{upload_id}/cancel", headers={"x-stainless-retry-count": "1"})
    assert again.json()["status"] == "cancelled"
    assert not (services.settings.data_dir / "store" / "blobs").exists()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "part_ids"),
        ({"part_ids": []}, "part_ids"),
        ({"part_ids": ["part-x"], "md5": "no digest"}, "md5"),
        ({"part_ids": ["part-x"]}, "part_ids"),
    ],
)
def test_a_completion_that_names_no_parts_is_refused(client: TestClient, body: dict[str, Any], param: str) -> None:
    upload_id = begin(client).json()["id"]

    assert error_of(client.post(f"/v1/uploads/{upload_id}/complete", json=body))["param"] == param


def test_a_completion_with_another_md5_makes_no_file(client: TestClient) -> None:
    upload_id = begin(client).json()["id"]
    part = add(client, upload_id, CONTENT).json()["id"]
    path = f"/v1/uploads/{upload_id}/complete"

    refused = client.post(path, json={"part_ids": [part], "md5": hashlib.md5(b"other").hexdigest()})
    done = client.post(path, json={"part_ids": [part], "md5": hashlib.md5(CONTENT).hexdigest()})

    assert (refused.status_code, error_of(refused)["code"]) == (400, "md5_mismatch")
    assert done.json()["status"] == "completed"
